"""What command lines of measurements share: lists, separated by commas."""

import argparse
from collections.abc import Callable, Collection

__all__ = ["listed"]


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
