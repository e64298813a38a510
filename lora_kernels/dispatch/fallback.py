"""What takes over if the kernels of an algorithm do not compile or launch."""

import re
import subprocess
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from lora_kernels.dispatch.algorithm import ALGORITHMS, Algorithm

__all__ = ["failures", "is_a_kernels", "run"]

_Result = TypeVar("_Result")

_failed: dict[tuple[str, tuple], str] = {}
# Errors of the device, which any later call may raise, and running out of memory.
_NOT_OURS = re.compile(
    "out of memory|ALLOC_FAILED|CUDA error|illegal|misaligned|unspecified launch failure"
    "|device-side assert|captur",
    re.IGNORECASE,
)


def run(
    algorithm: Algorithm, what: Callable[[], tuple], compute: Callable[[str], _Result]
) -> _Result:
    """compute(algorithm.name), or the next algorithm's result if kernels do not compile or launch.

    what: returns the op, device and dtypes. An algorithm that has failed for these is not tried
    again, and one warning says so. Running out of memory and the device's own errors are raised.
    """
    for name in ALGORITHMS[ALGORITHMS.index(algorithm.name) : -1]:
        if _failed and (name, what()) in _failed:
            continue
        try:
            return compute(name)
        except Exception as error:
            if not is_a_kernels(error):
                raise
            _give_up(name, what(), error)
    return compute("reference")


def failures() -> dict[tuple[str, tuple], str]:
    """By (algorithm, what), why kernels did not compile or launch in this process.

    what: the result of what() in run().
    """
    return dict(_failed)


def _give_up(name: str, what: tuple, error: Exception) -> None:
    reason = _failed[name, what] = f"{type(error).__name__}: {error}"
    following = ALGORITHMS[ALGORITHMS.index(name) + 1]
    warnings.warn(
        f"lora_kernels: algorithm {name} failed for {' '.join(map(str, what))} and {following} "
        f"takes its place: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def is_a_kernels(error: Exception) -> bool:
    """Whether a kernel did not compile or launch; not whether the device or this package failed."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return isinstance(error, ImportError)
    if isinstance(error, TritonError):
        return True
    faults = (ImportError, OSError, RuntimeError, subprocess.SubprocessError)
    outside = isinstance(error, torch.OutOfMemoryError) or _NOT_OURS.search(str(error))
    return isinstance(error, faults) and not outside
