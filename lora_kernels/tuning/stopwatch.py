"""Interleaved timing: every round calls each step once, in a new order.

On a GPU the time is that of CUDA events, in front of which L2 is made cold, around eager calls or
replays of CUDA graphs.
"""

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "CannotCaptureError", "Events", "Step", "Stopwatch", "capture", "cold_copies", "interleave",
    "l2_bytes", "nothing", "stopwatch_of", "wall_seconds",
]  # fmt: skip

WARMUP_ROUNDS = 3
MIN_ROUNDS = 20  # the fewest that the 99 % interval of rows.py makes sense of
MOST_COPIES = 64

_Key = TypeVar("_Key")

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


def wall_seconds(call: Callable[[], object]) -> float:
    """The stopwatch of the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    steps: Mapping[_Key, Step],
    seconds: float,
    stopwatch: Stopwatch = wall_seconds,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[_Key, list[float]]:
    """Seconds of each step; entry i of every list comes from round i.

    Noise of the machine hits all steps of a round alike, and no step always runs in the wake of the
    same other. Rounds go on until ``seconds`` have passed, warm-up not counted.
    """
    order = list(steps)
    shuffle = random.Random(0).shuffle
    samples: dict[_Key, list[float]] = {name: [] for name in steps}

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
        while steps and (rounds < MIN_ROUNDS or clock() < end):
            run_round(record=True)
            rounds += 1
    finally:
        gc.enable()
    return samples


def stopwatch_of(device: str, hide_launch: bool) -> Stopwatch:
    """The stopwatch of a device, "cpu" or "cuda"; hide_launch: as Events has it."""
    return Events(hide_launch) if device == "cuda" else wall_seconds


class Events:
    """A stopwatch of CUDA events, with a cold L2 in front of every call.

    hide_launch: the GPU is still busy when the call is issued, so that Python's time to issue it is
    not measured; right for the replay of a graph. Otherwise the GPU waits for Python, as it does in
    eager mode.
    """

    def __init__(self, hide_launch: bool):
        self._hide_launch = hide_launch
        # Read, not written: dirty lines would be written back in the time of the call.
        self._evict = torch.zeros(l2_bytes(), dtype=torch.float32, device="cuda")  # four times L2
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        self._evict.sum()
        if not self._hide_launch:
            torch.cuda.synchronize()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def l2_bytes() -> int:
    """The size of the GPU's L2."""
    return torch.cuda.get_device_properties().L2_cache_size


def cold_copies(weight: Tensor, l2: int) -> int:
    """How many layers of this weight a stack needs for none of them to be in L2 when it is read."""
    return min(max(1, math.ceil(3 * l2 / weight.nbytes)), MOST_COPIES)


class CannotCaptureError(Exception):
    """A step that does not run under a CUDA graph, or not as it does without one."""


def capture(step: Step, draws: bool) -> Step:
    """The same step as replays of CUDA graphs.

    draws: the step draws dropout, and has to draw anew in every replay.
    Raises: CannotCaptureError.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def graph(function):
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=pool, stream=stream):
            outputs = function()
        return captured, outputs

    try:
        with step.context():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_ROUNDS):
                    step.prepare()
                    step.call()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            # A backward frees what its forward saved into the pool they share: replayed in turn
            # they are right, and the forward's replay is not timed.
            prepare = nothing if step.prepare is nothing else graph(step.prepare)[0].replay
            captured, outputs = graph(step.call)
    except RuntimeError as error:
        raise CannotCaptureError(f"not under a CUDA graph: {str(error).splitlines()[0]}") from error
    replayed = Step(captured.replay, prepare, times=step.times)
    if draws and not _draws_anew(replayed, outputs[0]):
        raise CannotCaptureError("a CUDA graph repeats its dropout mask")
    return replayed


def _draws_anew(step: Step, output: Tensor) -> bool:
    results = []
    for _ in range(2):
        step.prepare()
        step.call()
        results.append(output.clone())
    return not torch.equal(*results)
