"""How a program ends that the user stops, or that what the user gave is at fault for."""

import os
import shlex
import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "InputError", "resuming", "until_interrupted"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


class InputError(Exception):
    """A bad file, option or model, told in one line; the program ends with exit code 2."""


def resuming(program: str) -> str:
    """What to do after Ctrl-C: the command line of this process, with --resume."""
    arguments = [part for part in sys.argv[1:] if part != "--resume"]
    return f"this goes on: {shlex.join(['python', '-m', program, *arguments, '--resume'])}"


def until_interrupted(main: Callable[[], int], what_now: str) -> int:
    """main(), or INTERRUPTED after Ctrl-C, with one line that says what to do now."""
    try:
        return main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
            print(f"\ninterrupted: {what_now}", file=sys.stderr)
        return INTERRUPTED
