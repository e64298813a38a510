"""Types of command-line options, for argparse."""

import argparse
from collections.abc import Callable

__all__ = ["names", "number"]


def names(text: str) -> list[str]:
    """Names with commas between them."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return parts


def number(kind: type, low: float, below: float = float("inf")) -> Callable[[str], float]:
    """A number of this kind in [low, below)."""

    def parse(text: str):
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {below}), got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where kind(text) fails
    return parse
