"""One cell from beginning to end: check all implementations, count, time interleaved, make rows."""

import contextlib
import gc
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bench import accuracy, counters
from bench.cells import Cell
from bench.implementations import FLOOR, Implementation
from bench.models import ModelCell, ModelSubject
from bench.rows import make_rows
from lora_kernels.dispatch.fallback import failures
from lora_kernels.tuning import machine, stopwatch
from lora_kernels.tuning.rows import BACKWARD, BOTH, FORWARD, GRAPH
from lora_kernels.tuning.stopwatch import Step

__all__ = ["LayerSubject", "measure", "step", "subject_of"]

COLD_TOKENS = 512  # up to here the weight is read from memory, not from L2


class LayerSubject:
    """A single layer; for few tokens on a GPU a stack of equal ones, so that weights are cold.

    copies: of layers in the stack that is timed.
    """

    def __init__(self, cell: Cell):
        self.problem = cell.problem()
        self.x, self.dy = self.problem.x, self.problem.dy
        self.copies = 1
        if cell.device == "cuda" and cell.m <= COLD_TOKENS:
            self.copies = stopwatch.cold_copies(self.problem.w, stopwatch.l2_bytes())

    def check(self, implementation: Implementation) -> None:
        """By the formula under the implementation's own mask."""
        accuracy.check(implementation.name, implementation.build, self.problem)

    def build(self, implementation: Implementation) -> nn.Module:
        """The layer."""
        return implementation.build(self.problem)


def subject_of(cell: Cell | ModelCell) -> LayerSubject | ModelSubject:
    """What a cell measures: a layer, or for the cells of models.py a model."""
    return LayerSubject(cell) if isinstance(cell, Cell) else ModelSubject(cell)


def measure(
    cell,
    subject: LayerSubject | ModelSubject,
    implementations: Mapping[str, Implementation],
    seconds: float,
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Row and times of each implementation of a cell. Skipped ones have a row that says why."""
    on_gpu = cell.device == "cuda"
    state_before = machine.gpu_state() if on_gpu else None
    x = subject.x.requires_grad_()
    steps, counted, skipped = {}, {}, {}
    for name, implementation in implementations.items():
        try:
            with implementation.context():
                steps[name], counted[name] = _prepare(cell, subject, implementation, x)
        except Exception as error:  # whatever a peer does, the others are measured
            skipped[name] = _reason(error)
    timer = stopwatch.stopwatch_of(cell.device, hide_launch=cell.execution == GRAPH)
    samples = stopwatch.interleave(steps, seconds, timer)
    rows = make_rows(cell.fields(), implementations, samples, skipped)
    states = {"state_before": state_before, "state_after": machine.gpu_state() if on_gpu else None}
    for name, row in rows.items():
        row |= counted.get(name, {}) | states
    # Every cell starts with the same state of the compiler and of the allocator.
    del steps
    torch.compiler.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return rows, samples


class SkippedError(Exception):
    """Why an implementation has no time."""


def _prepare(cell, subject: LayerSubject | ModelSubject, implementation: Implementation, x: Tensor):
    """The step of an implementation, once its results are right, and its counters."""
    if implementation.needs and importlib.util.find_spec(implementation.needs) is None:
        raise SkippedError(f"{implementation.needs} is not installed")
    subject.check(implementation)
    modules = [subject.build(implementation) for _ in range(subject.copies)]
    single = step(modules[:1], x, subject.dy, cell.mode, implementation.context)
    counted = counters.count(modules[0], x, single)
    _require_algorithm(implementation, x)
    whole = step(modules, x, subject.dy, cell.mode, implementation.context)
    if cell.execution == GRAPH:
        whole = stopwatch.capture(whole, draws=cell.dropout_p > 0 and implementation.name != FLOOR)
    return whole, counted


def _require_algorithm(implementation: Implementation, x: Tensor) -> None:
    """SkippedError if another algorithm took the place of the implementation's own."""
    for (name, what), reason in failures().items():
        if name == implementation.algorithm and x.dtype in what and x.device in what:
            raise SkippedError(f"algorithm {name} failed: {reason.splitlines()[0]}")


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AssertionError):
        return f"wrong: {text}"
    if isinstance(error, (SkippedError, stopwatch.CannotCaptureError)):
        return text
    return f"{type(error).__name__}: {text}"


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
    leaves = [(x, *accuracy.trained(module)) for module in modules]
    outputs: list[Tensor] = []

    def forward():
        return [module(x) for module in modules]

    def keep_outputs():
        outputs[:] = forward()

    def backward(results=outputs):
        pairs = zip(reversed(results), reversed(leaves), strict=True)
        return [grad for y, inputs in pairs for grad in torch.autograd.grad(y, inputs, dy)]

    call, prepare = {
        FORWARD: (forward, stopwatch.nothing),
        BACKWARD: (backward, keep_outputs),
        BOTH: (lambda: backward(forward()), stopwatch.nothing),
    }[mode]
    return Step(call, prepare, context, times=len(modules))
