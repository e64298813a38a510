"""One cell from beginning to end: check every provider, count, time all interleaved, make rows."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bench import accuracy, counters, cuda, timing
from bench.providers import FLOOR, Provider
from bench.rows import make_rows
from bench.shapes import GRAPH, Cell
from lora_kernels.plan import failures

__all__ = ["LayerSubject", "Subject", "measure", "subject_of"]

COLD_TOKENS = 512  # up to here the weight is read from memory, not from L2


class Subject(Protocol):
    """What the providers of a cell run on."""

    x: Tensor
    dy: Tensor
    copies: int  # layers in the stack that is timed

    def check(self, provider: Provider) -> None:
        """AssertionError where the provider's results are wrong."""

    def build(self, provider: Provider) -> nn.Module: ...


@dataclass
class LayerSubject:
    """A single layer; for few tokens on a GPU a stack of equal ones, so that weights are cold."""

    cell: Cell

    def __post_init__(self):
        self.problem = self.cell.problem()
        self.x, self.dy = self.problem.x, self.problem.dy
        self.copies = 1
        if self.cell.device == "cuda" and self.cell.m <= COLD_TOKENS:
            self.copies = cuda.cold_copies(self.problem.w, cuda.l2_bytes())

    def check(self, provider: Provider) -> None:
        accuracy.check(provider.name, provider.build, self.problem)

    def build(self, provider: Provider) -> nn.Module:
        return provider.build(self.problem)


def measure(
    cell, subject: Subject, providers: Mapping[str, Provider], seconds: float
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Row and times of each provider of a cell. Withheld ones have a row that says why."""
    on_gpu = cell.device == "cuda"
    state_before = cuda.gpu_state() if on_gpu else None
    x = subject.x.requires_grad_()
    steps, counted, withheld = {}, {}, {}
    for name, provider in providers.items():
        try:
            with provider.context():
                steps[name], counted[name] = _prepare(cell, subject, provider, x)
        except Exception as error:  # whatever a peer does, the others are measured
            steps.pop(name, None)
            withheld[name] = _reason(error)
    stopwatch = cuda.Events(hide_launch=cell.execution == GRAPH) if on_gpu else timing.wall_seconds
    samples = timing.interleave(steps, seconds, stopwatch) if steps else {}
    rows = make_rows(cell.fields(), providers, samples, withheld)
    state_after = cuda.gpu_state() if on_gpu else None
    for name, row in rows.items():
        row |= counted.get(name, {})
        row |= {"state_before": state_before, "state_after": state_after}
    del steps
    _release()
    return rows, samples


class WithheldError(Exception):
    """Why a provider has no time."""


def _prepare(cell, subject: Subject, provider: Provider, x: Tensor) -> tuple[timing.Step, dict]:
    missing = provider.missing()
    if missing:
        raise WithheldError(missing)
    subject.check(provider)
    modules = [subject.build(provider) for _ in range(subject.copies)]
    single = timing.step(modules[:1], x, subject.dy, cell.mode, provider.context)
    counted = counters.count(modules[0], x, single)
    _require_plan(provider, x)
    step = timing.step(modules, x, subject.dy, cell.mode, provider.context)
    if cell.execution == GRAPH:
        random = cell.dropout_p > 0 and provider.name != FLOOR
        step = cuda.capture(step, random)
    return step, counted


def _require_plan(provider: Provider, x: Tensor) -> None:
    """WithheldError where another plan took the place of the provider's own."""
    for (name, what), reason in failures().items():
        if name == provider.plan and x.dtype in what and x.device in what:
            raise WithheldError(f"plan {name} failed: {reason.splitlines()[0]}")


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AssertionError):
        return f"wrong: {text}"
    if isinstance(error, (WithheldError, cuda.CannotCaptureError)):
        return text
    return f"{type(error).__name__}: {text}"


def _release() -> None:
    """Every cell starts with the same state of the compiler and of the allocator."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def subject_of(cell) -> Subject:
    """What a cell measures: a layer, or for the cells of models.py a model."""
    return LayerSubject(cell) if isinstance(cell, Cell) else cell.subject()
