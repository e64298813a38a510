"""LORA_KERNELS_TUNE=first-use: the first calls of a training run decide between algorithms.

A product that no measurement holds for is computed by both algorithms a few times, in turn. The
faster one is kept for products of its shape, here and in the user's cache directory.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable

import torch

from lora_kernels.dispatch import fallback, measured
from lora_kernels.dispatch.algorithm import capability_of, with_same_kernels
from lora_kernels.dispatch.table import GemmShape, TuningEntry

__all__ = ["VALUES", "decide", "is_asked"]

VALUES = ("0", "first-use")  # of the variable, the default first
_VARIABLE = "LORA_KERNELS_TUNE"
_WARM_UP, _ROUNDS = 2, 7
_NAMES = ("fused", "addmm")


def is_asked(device: torch.device) -> bool:
    """Whether calls are to be measured: not in a graph, whose launches take no time of their own.

    Raises: ValueError if LORA_KERNELS_TUNE has an unknown value.
    """
    asked = os.environ.get(_VARIABLE, "0")
    if asked not in VALUES:
        raise ValueError(f"{_VARIABLE} must be 0 or first-use, got {asked!r}")
    if asked == "0" or device.type != "cuda":
        return asked != "0"
    return not torch.cuda.is_current_stream_capturing()


def decide(shape: GemmShape, what: Callable[[], tuple], compute: Callable[[str], object]) -> str:
    """The faster algorithm, after both have computed a call a few times, in turn.

    what: as fallback.run has it. compute(algorithm): repeatable, with the same result each time. If
    one of them fails, the other is taken, or reference if both do, and a warning says so; running
    out of memory and errors of the device are raised.
    """
    seconds: dict[str, list[float]] = {}
    errors: dict[str, fallback.KernelError] = {}
    for name in _NAMES:
        if fallback.has_failed(name, what):
            continue
        try:
            for _ in range(_WARM_UP):
                compute(name)
            seconds[name] = []
        except fallback.KernelError as failure:
            errors[name] = failure
    for _ in range(_ROUNDS if len(seconds) > 1 else 0):
        for name, taken in seconds.items():
            taken.append(_seconds(functools.partial(compute, name), shape.device))
    best = min(seconds, key=lambda name: _median(seconds[name] or [0.0]), default="reference")
    for name, error in errors.items():
        fallback.give_up(name, what(), error, best)
    if seconds:
        _keep(shape, best, seconds)
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _keep(shape: GemmShape, best: str, seconds: dict[str, list[float]]) -> None:
    """For as many rows to twice as many, by powers of two, and this n, k and r."""
    least = 1 << (shape.m.bit_length() - 1)
    rows = least, 2 * least - 1
    if not shape.backward:
        rows = with_same_kernels(shape.m, rows, shape.dropout)
    entry = TuningEntry(
        capability_of(shape.device),
        shape.dtype,
        best,
        measured.SOURCE,
        m=rows,
        n=(shape.n, shape.n),
        k=(shape.k, shape.k),
        r=(shape.r, shape.r),
        dropout=shape.dropout,
        tma=shape.tma,
        backward=shape.backward,
        uniform=shape.uniform,
    )
    ratio = None
    if len(seconds) == len(_NAMES):
        ratios = [fused / addmm for fused, addmm in zip(*seconds.values(), strict=True)]
        ratio = _median(ratios), min(ratios), max(ratios)
    try:
        measured.add(shape.device, [measured.as_json(entry, ratio)])
    except OSError as error:
        warnings.warn(
            f"lora_kernels: {_VARIABLE}: what is measured stays in this process: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
