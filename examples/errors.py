"""How a program ends that the user stops, or that what the user gave is at fault for."""

import os
import shlex
import signal
import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "TERMINATED", "InputError", "Terminated", "resuming", "until_interrupted"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends
TERMINATED = 143  # of one that SIGTERM ends, as of Slurm, docker stop and kill


class Terminated(KeyboardInterrupt):
    """SIGTERM: a program ends as after Ctrl-C, but for its exit code."""


class InputError(Exception):
    """A bad file, option or model, told in one line; the program ends with exit code 2."""


def resuming(program: str) -> str:
    """What to do after Ctrl-C or SIGTERM: the command line of this process, with --resume."""
    arguments = [part for part in sys.argv[1:] if part != "--resume"]
    return f"this goes on: {shlex.join(['python', '-m', program, *arguments, '--resume'])}"


def until_interrupted(main: Callable[[], int], what_now: str) -> int:
    """main(), or INTERRUPTED after Ctrl-C, TERMINATED after SIGTERM; a line says what to do now."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return main()
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
            print(f"\ninterrupted: {what_now}", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off what is written
    raise Terminated
