"""What command lines of this suite share."""

import argparse
from collections.abc import Callable, Collection

__all__ = ["listed"]


def listed(kind: Callable[[str], object], choices: Collection = ()) -> Callable[[str], list]:
    """A comma-separated option as a list of kind, each one of choices where there are any."""

    def parse(text: str) -> list:
        try:
            values = [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        for value in values:
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return values

    return parse
