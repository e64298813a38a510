"""Environment variables that are on or off, and the line about a value that one does not take."""

import functools
import os
import warnings

__all__ = ["SWITCHES", "VALUES", "is_on", "notice", "warn_once"]

VALUES = ("", "0", "1")  # of the switches, what stands for unset first
SWITCHES = {  # what any other value of them is taken for
    "LORA_KERNELS_CHECK": "unset",
    "LORA_KERNELS_QUIET": "1",
    "LORA_KERNELS_REPORT": "1",
}


def is_on(name: str) -> bool:
    """Whether a switch is on, if other values than 0 turn it on."""
    notice(name)
    return os.environ.get(name, "0") not in ("", "0")


def notice(name: str) -> None:
    """Warns, once for each value, if a switch has one that it does not take."""
    value = os.environ.get(name, "")
    if value not in VALUES:
        warn_once(f"{name} must be 0 or 1, got {value!r}: it is taken for {SWITCHES[name]}")


@functools.cache
def warn_once(text: str, stacklevel: int = 3) -> None:
    """A warning in one line, once in this process; stacklevel as warnings.warn counts it."""
    warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
