"""What the machine can do at best, measured in the same run, and what of it the kernels reach.

A kernel takes at least as long as its FLOPs at the rate of a large product, or its bytes at the
rate of a large copy, whichever is longer. That time over the measured one is the fraction that the
kernel reaches of the ceiling.
"""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lora_kernels.tuning import stopwatch
from lora_kernels.tuning.rows import BOTH, OURS
from lora_kernels.tuning.stopwatch import Step

__all__ = ["Work", "element_bytes", "kernel_work", "measure", "step_work"]

ROUNDS = 20
LAUNCHES = 100
# On a CPU as large as the time allows: well beyond its caches, and a tenth of a second.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}


def measure(device: str, dtype: torch.dtype) -> dict[str, float]:
    """copy_tb_s counts what is read and what is written; product_tflop_s is cuBLAS's or the CPU's.

    launch_us: the time that one tiny operation after another takes, in a CUDA graph on a GPU.
    """
    size, moved = PRODUCT_SIZE[device], COPY_BYTES[device]
    source = torch.randn(moved // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    tiny = torch.zeros(1, device=device)

    def launches():
        for _ in range(LAUNCHES):
            tiny.add_(1)
        return [tiny]

    copy = _median(Step(lambda: target.copy_(source)), device)
    multiply = _median(Step(lambda: torch.mm(left, right, out=product)), device)
    return {
        "copy_tb_s": 2 * moved / copy / 1e12,
        "product_tflop_s": 2 * size**3 / multiply / 1e12,
        "launch_us": _median(Step(launches, times=LAUNCHES), device) * 1e6,
    }


def _median(step: Step, device: str) -> float:
    if device == "cuda":
        step = stopwatch.capture(step, draws=False)
    timer = stopwatch.stopwatch_of(device, hide_launch=True)
    samples = [timer(step.call) / step.times for _ in range(stopwatch.WARMUP_ROUNDS + ROUNDS)]
    return statistics.median(samples[stopwatch.WARMUP_ROUNDS :])


class Work(NamedTuple):
    """What a step or one of its kernels does, and how long it takes."""

    name: str
    flops: float
    moved: float  # bytes
    seconds: float

    def fraction(self, row: Mapping) -> float:
        """Of the ceiling of the row's machine."""
        arithmetic = self.flops / (row["product_tflop_s"] * 1e12)
        return max(arithmetic, self.moved / (row["copy_tb_s"] * 1e12)) / self.seconds


def step_work(row: Mapping, floor: bool) -> Work:
    """A step of a linear layer at its least traffic; floor: without an update."""
    m, k, n, r, element = _sizes(row)
    flops = 4 * m * k * n + (0 if floor else 6 * m * r * (k + n))
    traffic = 2 * element * (m * k + k * n + m * n)
    return Work(row["implementation"], flops, traffic, row["median_ms"] / 1e3)


def kernel_work(row: Mapping) -> list[Work]:
    """The kernels of this package in a linear layer's whole step, by their FLOPs and bytes.

    A kernel that has more launchers than launches was launched by the first of them: expand by
    expand_y alone, if dx comes from another kernel.
    """
    linear = row["kind"] == "layer" and len(row["enable_lora"]) == 1
    counted = row["implementation"].startswith(OURS) and row["kernels"]
    if not (linear and counted and row["mode"] == BOTH):
        return []
    from lora_kernels.kernels.registry import KERNELS, Dims  # imports triton

    dims, found = Dims(*_sizes(row)), []
    for name, counts in row["kernels"].items():
        for kernel in KERNELS.values():
            launchers = kernel.launchers[: counts["launches"]]
            if launchers and name.startswith(kernel.function.fn.__name__):
                flops = sum(launcher.flops(dims) for launcher in launchers)
                moved = sum(launcher.moved(dims) for launcher in launchers)
                found.append(Work(name, flops, moved, counts["us"] * 1e-6))
    return found


def element_bytes(row: Mapping) -> int:
    """Of the dtype of a row."""
    return getattr(torch, row["dtype"]).itemsize


def _sizes(row: Mapping) -> tuple[int, int, int, int, int]:
    return row["m"], row["k"], row["n"], row["r"], element_bytes(row)
