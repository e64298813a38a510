"""What command lines of measurements share: numbers, and lists separated by commas."""

import argparse
from collections.abc import Callable, Collection

__all__ = ["count", "duration", "listed", "probability"]


def count(text: str) -> int:
    """The type of an option that is a number of things, at least one."""
    return _number(int, text, "an integer >= 1", lambda value: value >= 1)


def probability(text: str) -> float:
    """The type of an option that is a probability of dropout."""
    return _number(float, text, "in [0, 1)", lambda value: 0 <= value < 1)


def duration(text: str) -> float:
    """The type of an option that is a time."""
    return _number(float, text, "a number > 0", lambda value: value > 0)


def _number(kind: type, text: str, expected: str, fits: Callable[[float], bool]):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


def listed(kind: Callable[[str], object], choices: Collection = ()) -> Callable[[str], list]:
    """The type of an option that is a list of kind, each one of choices if there are any."""

    def parse(text: str) -> list:
        try:
            values = [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        for value in values:
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(
                    f"{value!r} is not one of {', '.join(map(str, choices))}"
                )
        return values

    return parse
