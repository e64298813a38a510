"""Interleaved timing: every round calls each provider once, in a new order."""

import contextlib
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.shapes import BACKWARD, BOTH, FORWARD

__all__ = ["RecordedClock", "Step", "Stopwatch", "interleave", "nothing", "step", "wall_seconds"]

WARMUP_ROUNDS = 3
MIN_ROUNDS = 20  # the fewest that the 99 % interval of rows.py makes sense of

# Runs a call and says how many seconds it took.
Stopwatch = Callable[[Callable[[], object]], float]


def nothing() -> None:
    """The preparation of a step that needs none."""


@dataclass(frozen=True)
class Step:
    """What is timed, and what is not: a context around it and a preparation before it.

    times: how many times the call does the work of one step.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] = nothing
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    times: int = 1


def step(
    modules: Sequence[nn.Module],
    x: Tensor,
    dy: Tensor,
    mode: str,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Step:
    """One training step of modules that all take x, as a stack of layers would run them.

    First every forward, then every backward in reverse: a layer's weight is read again only after
    those of the others. The call returns the tensors that it computed.
    """
    leaves = [(x, *trained(module)) for module in modules]
    outputs: list[Tensor] = []

    def forward():
        return [module(x) for module in modules]

    def keep_outputs():
        outputs[:] = forward()

    def backward(results=outputs):
        pairs = zip(reversed(results), reversed(leaves), strict=True)
        return [grad for y, inputs in pairs for grad in torch.autograd.grad(y, inputs, dy)]

    def forward_backward():
        return backward(forward())

    calls = {
        FORWARD: (forward, nothing),
        BACKWARD: (backward, keep_outputs),
        BOTH: (forward_backward, nothing),
    }
    return Step(*calls[mode], context, times=len(modules))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in their order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def wall_seconds(call: Callable[[], object]) -> float:
    """The stopwatch of the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    stopwatch: Stopwatch = wall_seconds,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step; entry i of every list comes from round i.

    Noise of the machine hits all providers of a round alike, and no provider always runs in the
    wake of the same other. Rounds go on until ``seconds`` have passed, warm-up not counted.
    """
    order = list(steps)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in steps}

    def run_round(record: bool) -> None:
        shuffle(order)
        for name in order:
            step = steps[name]
            with step.context():
                step.prepare()
                elapsed = stopwatch(step.call) / step.times
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
