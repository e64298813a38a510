"""What the machine can do at best: a large copy, a large product, a launch; in the same run."""

import statistics
from collections.abc import Callable

import torch

from bench import cuda, timing
from bench.roofline import Part

__all__ = ["measure", "part"]

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
    tiny = torch.zeros(1, device=device)

    def launches():
        for _ in range(LAUNCHES):
            tiny.add_(1)
        return [tiny]

    product = torch.empty(size, size, device=device, dtype=dtype)
    seconds = {
        "copy": _median(timing.Step(lambda: target.copy_(source)), device),
        "product": _median(timing.Step(lambda: torch.mm(left, right, out=product)), device),
        "launch": _median(timing.Step(launches, times=LAUNCHES), device),
    }
    return {
        "copy_tb_s": 2 * moved / seconds["copy"] / 1e12,
        "product_tflop_s": 2 * size**3 / seconds["product"] / 1e12,
        "launch_us": seconds["launch"] * 1e6,
    }


def _median(step: timing.Step, device: str) -> float:
    stopwatch: Callable = timing.wall_seconds
    if device == "cuda":
        step, stopwatch = cuda.capture(step, random=False), cuda.Events(hide_launch=True)
    samples = [stopwatch(step.call) / step.times for _ in range(timing.WARMUP_ROUNDS + ROUNDS)]
    return statistics.median(samples[timing.WARMUP_ROUNDS :])


def part(row: dict) -> Part | None:
    """The machine of a row, None where the run did not measure its ceilings."""
    if row["copy_tb_s"] is None:
        return None
    return Part(
        flops=row["product_tflop_s"] * 1e12, bandwidth=row["copy_tb_s"] * 1e12,
        launch=row["launch_us"] * 1e-6,
    )  # fmt: skip
