"""What timing needs of CUDA: events, graphs, a cold L2, clocks. Nothing here runs without a GPU."""

import math
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import WARMUP_ROUNDS, Step, nothing

__all__ = ["CannotCaptureError", "Events", "capture", "cold_copies", "gpu_state"]

MOST_COPIES = 64
QUERY = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


class CannotCaptureError(Exception):
    """A step that does not run under a CUDA graph, or not as it does without one."""


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
    return torch.cuda.get_device_properties().L2_cache_size


def cold_copies(weight: Tensor, l2: int) -> int:
    """How many layers of this weight a stack needs for none of them to be in L2 when it is read."""
    return min(max(1, math.ceil(3 * l2 / weight.nbytes)), MOST_COPIES)


def capture(step: Step, random: bool) -> Step:
    """The same step as replays of CUDA graphs.

    random: the step draws dropout, and has to draw anew in every replay.
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
    if random and not _draws_anew(replayed, outputs[0]):
        raise CannotCaptureError("a CUDA graph repeats its dropout mask")
    return replayed


def _draws_anew(step: Step, output: Tensor) -> bool:
    results = []
    for _ in range(2):
        step.prepare()
        step.call()
        results.append(output.clone())
    return not torch.equal(*results)


def gpu_state() -> dict[str, str]:
    """Driver, clocks in MHz, temperature in °C and power in W of this process's GPU, as text."""
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = [
        "nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(QUERY)}",
        "--format=csv,noheader,nounits",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return parse_state(done.stdout)


def parse_state(text: str) -> dict[str, str]:
    """The line that nvidia-smi prints for QUERY, by name."""
    values = [value.strip() for value in text.strip().split(",")]
    return dict(zip(QUERY, values, strict=True))
