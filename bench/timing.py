"""Interleaved timing: every round calls each provider once, in a new order."""

import gc
import random
import time
from collections.abc import Callable, Mapping

from torch import Tensor, nn

__all__ = ["RecordedClock", "interleave", "step"]

WARMUP_ROUNDS = 3
MIN_ROUNDS = 20  # the fewest that the 99 % interval of report.py makes sense of

# Untimed preparation, and the call that is timed.
Step = tuple[Callable[[], None], Callable[[], object]]


def step(module: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Step:
    """One training step of a layer alone; "forward" stops before the backward."""

    def prepare():
        module.zero_grad(set_to_none=True)
        x.grad = None

    def forward():
        module(x)

    def forward_backward():
        module(x).backward(dy)

    return prepare, {"forward": forward, "forward+backward": forward_backward}[mode]


def interleave(
    steps: Mapping[str, Step], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call; entry i of every list comes from round i.

    Noise of the machine hits all providers of a round alike, and no provider always runs in the
    wake of the same other. Rounds go on until ``seconds`` have passed, warm-up not counted.
    """
    order = list(steps)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in steps}

    def run_round(record: bool) -> None:
        shuffle(order)
        for name in order:
            prepare, call = steps[name]
            prepare()
            start = clock()
            call()
            elapsed = clock() - start
            if record:
                samples[name].append(elapsed)

    gc.collect()
    gc.disable()
    try:
        for _ in range(WARMUP_ROUNDS):
            run_round(record=False)
        end, rounds = clock() + seconds, 0
        while rounds < MIN_ROUNDS or clock() < end:
            run_round(record=True)
            rounds += 1
    finally:
        gc.enable()
    return samples


class RecordedClock:
    """A timer for pytest-benchmark that stands still but for the times it is told."""

    __name__ = "recorded"  # the timer's name in pytest-benchmark's JSON

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
