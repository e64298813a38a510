"""What takes over if the kernels of an algorithm do not compile or launch."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lora_kernels.dispatch.algorithm import ALGORITHMS, Algorithm

__all__ = ["KernelError", "count", "failures", "give_up", "has_failed", "of_kernels", "run"]

_Result = TypeVar("_Result")


class KernelError(RuntimeError):
    """A kernel did not compile or launch, for the reason that its cause gives."""


_failed: dict[tuple[str, tuple], str] = {}
# RuntimeErrors of the device, which any later call may raise, and running out of memory. Compilers
# use some of the words, too, and have classes of their own.
_NOT_OURS = re.compile(
    "out of memory|ALLOC_FAILED|CUDA error|HIP error|illegal (memory|instruction)|misaligned"
    "|unspecified launch failure|device-side assert|captur",
    re.IGNORECASE,
)


@contextlib.contextmanager
def of_kernels() -> Iterator[None]:
    """Whatever goes wrong within is a KernelError; not running out of memory, nor the device."""
    try:
        yield
    except Exception as error:
        outside = isinstance(error, RuntimeError) and _NOT_OURS.search(str(error))
        if isinstance(error, (KernelError, torch.OutOfMemoryError)) or outside:
            raise
        raise KernelError(f"{type(error).__name__}: {error}") from error


def run(
    algorithm: Algorithm, what: Callable[[], tuple], compute: Callable[[str], _Result]
) -> _Result:
    """compute(algorithm.name), or the next algorithm's result after a KernelError.

    what: returns the op, the device and what else decides which kernels are compiled. An algorithm
    that has failed for these is not tried again, and one warning says so. All other errors are
    raised: those of the device, of PyTorch's own operators, and faults of this package.
    """
    for name in ALGORITHMS[ALGORITHMS.index(algorithm.name) : -1]:
        if has_failed(name, what):
            continue
        try:
            return compute(name)
        except KernelError as error:
            give_up(name, what(), error, ALGORITHMS[ALGORITHMS.index(name) + 1])
    return compute("reference")


def has_failed(name: str, what: Callable[[], tuple]) -> bool:
    """Whether an algorithm was given up for what(), as run() has it."""
    return bool(_failed) and (name, what()) in _failed


def failures() -> dict[tuple[str, tuple], str]:
    """By (algorithm, what), why kernels did not compile or launch in this process.

    what: the result of what() in run().
    """
    return dict(_failed)


def count() -> int:
    """How many failures there are, which decides what is tried."""
    return len(_failed)


def give_up(name: str, what: tuple, error: KernelError, following: str) -> None:
    """Notes that an algorithm has failed, and says so; following: the one that takes its place."""
    kind = "" if type(error) is KernelError else f"{type(error).__name__}: "
    reason = _failed[name, what] = f"{kind}{error}"
    warnings.warn(
        f"lora_kernels: algorithm {name} failed for {' '.join(map(str, what))} and {following} "
        f"takes its place: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
