"""Which version of a method an installed package has: by its source."""

import hashlib
import inspect
from collections.abc import Callable

__all__ = ["digest"]


def digest(function: Callable) -> str:
    """sha256 of the source of a method, as it stands in its file; of nothing if there is none."""
    try:
        # Of the code object, because of a wrapper inspect would show the function inside.
        source = inspect.getsource(function.__code__)
    except (AttributeError, OSError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()
