"""How a program ends that the user stops, or that what the user gave is at fault for."""

import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "InputError", "until_interrupted"]

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


class InputError(Exception):
    """A bad file, option or model, told in one line; the program ends with exit code 2."""


def until_interrupted(main: Callable[[], int], what_now: str) -> int:
    """main(), or INTERRUPTED after Ctrl-C, with one line that says what to do now."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\ninterrupted: {what_now}", file=sys.stderr)
        return INTERRUPTED
