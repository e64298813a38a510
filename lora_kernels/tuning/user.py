"""What `lora-kernels tune` measures on the user's GPU, and keeps in the user's cache directory.

First the tiles of the kernels, within half of the time; then the algorithms with these tiles, at
each shape, pass and dropout. Everything is checked against float64 before it is timed, and timed
interleaved. What is measured is kept at once: an end at any moment loses nothing but the rest.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora_kernels.checks import dtype_name
from lora_kernels.dispatch import measured
from lora_kernels.dispatch.algorithm import (
    capability_of,
    rows_of_small_m,
    unmeasured,
    with_same_kernels,
)
from lora_kernels.dispatch.fallback import KernelError
from lora_kernels.dispatch.table import GemmShape, TuningEntry
from lora_kernels.kernels import linear, measured_tiles
from lora_kernels.kernels.config import Config
from lora_kernels.kernels.selfcheck import Variant
from lora_kernels.spec import Needs
from lora_kernels.tuning import cases, check, rows, stopwatch, workers
from lora_kernels.tuning.cases import Case
from lora_kernels.tuning.rows import BACKWARD, FORWARD
from lora_kernels.tuning.shapes import Layer, Shape
from lora_kernels.tuning.stopwatch import CannotCaptureError
from lora_kernels.tuning.verdicts import confirm

__all__ = ["DEFAULTS", "Plan", "cells", "tune"]

# Launchers of lora_linear; the others have no alternative to compare them with.
TUNED = (
    "shrink", "gemm_fwd", "gemm_small_m", "expand_y", "expand_dx", "expand_grad_a", "grad_b",
    "gemm_bwd", "grad_a",
)  # fmt: skip
_TILES_SHARE = 0.5  # of the time
_COMPILATION = 2.0  # seconds of a candidate in a process, roughly
_LEAST = 0.05  # seconds, of what is timed at all
_NO_LIMIT = 10_000


@dataclass(frozen=True)
class Defaults:
    """What is tuned on a kind of device unless asked otherwise."""

    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    dtype: torch.dtype


DEFAULTS = {
    "cuda": Defaults((), (16, 512, 4096), torch.bfloat16),
    "cpu": Defaults((Layer(48, 40),), (32,), torch.float32),  # the interpreter
}


@dataclass(frozen=True)
class Plan:
    """What is to be measured within so many seconds.

    layers: [K, N] each, all different. factors: dtypes of lora_A and lora_B; None is the layer's.
    """

    device: torch.device
    dtype: torch.dtype
    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dropout: tuple[float, ...]
    factors: tuple[torch.dtype | None, ...]
    seconds: float
    jobs: int

    def shapes(self) -> list[Shape]:
        """Every layer at every number of tokens, rank, dropout and dtype of the factors."""
        dtype, device = self.dtype, self.device.type
        return [
            Shape(m, layer.k, layer.n, r, p, dtype=dtype, device=device, factors=factors)
            for layer, m, r, p, factors in itertools.product(
                self.layers, self.tokens, self.ranks, self.dropout, self.factors
            )
        ]

    def tile_cases(self) -> list[Case]:
        """Launchers at the shapes, with as many candidates as there may be time for."""
        found = cases.cases(TUNED, self.shapes(), None)
        each = _TILES_SHARE * self.seconds * self.jobs / max(1, len(found)) / _COMPILATION
        return cases.cases(TUNED, self.shapes(), min(max(1, int(each)), _NO_LIMIT))

    def tiles_in_words(self, found: Sequence[Case]) -> str:
        """How many candidates tile_cases() has found."""
        count = sum(len(case.configs) for case in found)
        return f"tiles: {count} candidates of {len(found)} launches in {self.jobs} processes"


def cells(plan: Plan) -> list[tuple[Shape, str]]:
    """The shapes and passes at which algorithms are compared."""
    return list(itertools.product(plan.shapes(), (FORWARD, BACKWARD)))


def tune(plan: Plan, write: Callable[[str], None]) -> int:
    """Measures, keeps and says what is found, line by line; returns how many cells were compared.

    Raises: OSError if the cache directory cannot be written; what the device raises.
    """
    start = time.monotonic()

    def left(share: float = 1.0) -> float:
        return start + share * plan.seconds - time.monotonic()

    if _tune_tiles(plan, left, write):
        measured_tiles.use.cache_clear()
    measured_tiles.use(plan.device)
    return _compare(plan, left, write)


# ---- tiles ----


def _tune_tiles(plan: Plan, left: Callable[..., float], write: Callable[[str], None]) -> int:
    """Keeps the tiles that beat the tables'; returns how many do."""
    found = plan.tile_cases()
    write(plan.tiles_in_words(found))
    failed = cases.try_out(found, plan.jobs, left(_TILES_SHARE) / 2)
    groups, kept = cases.by_entry(found), 0
    for index, group in enumerate(groups):
        # Two stages of every case that is left to time.
        remaining = sum(map(len, groups[index:]))
        seconds = left(_TILES_SHARE) / (2 * remaining)
        if index and seconds < _LEAST:
            write(f"  {len(groups) - index} of {len(groups)} tables were not reached in time")
            break
        samples: list[dict[Config, list[float]]] = []
        for case in group:
            samples.append({})
            try:
                _, samples[-1] = cases.measure(case, case.configs, failed[case], max(seconds, 0.0))
            except torch.OutOfMemoryError as error:  # the others may fit
                write(f"  {case}: not timed: {workers.reason(error)}")
        _, verdict = confirm(group, samples, max(seconds, 0.0))
        if verdict is not None and verdict.faster:
            tile = measured_tiles.as_json(group[0].kernel.name, verdict.when, verdict.best)
            measured.add(plan.device, tiles=[{**tile, "ratio": verdict.ratio}])
            kept += 1
            write(f"  {verdict.entry}: {rows.ratio_text(verdict.ratio)} of the table's time")
    return kept


# ---- algorithms ----


def _compare(plan: Plan, left: Callable[..., float], write: Callable[[str], None]) -> int:
    """Times fused and addmm at each cell, keeps the faster; returns how many were compared."""
    todo = cells(plan)
    write(f"algorithms: {len(todo)} products")
    right: dict[Variant, list[str]] = {}
    compared = 0
    for index, (shape, mode) in enumerate(todo):
        seconds = left() / (len(todo) - index)
        if index and seconds < _LEAST:
            write(f"  {len(todo) - index} of {len(todo)} products were not reached in time")
            break
        kind = _kind(shape)
        if kind not in right:
            right[kind] = _right(kind, plan.device, write)
        cell = f"{mode} {shape.m} x {shape.k} -> {shape.n} r={shape.r} p={shape.dropout_p:g}"
        cell += "" if shape.factors is None else f" {dtype_name(shape.factors)} factors"
        try:
            ratio = _ratio(shape, mode, right[kind], seconds)
        except (KernelError, CannotCaptureError, torch.OutOfMemoryError) as error:
            write(f"  {cell}: not compared: {workers.reason(error)}")
            continue
        entry = _entry(plan, shape, mode, ratio, right[kind])
        if entry is None:
            continue
        measured.add(plan.device, [measured.as_json(entry, ratio)])
        compared += ratio is not None
        said = f"{rows.ratio_text(ratio)} of addmm's time" if ratio else "not compared"
        write(f"  {cell}: fused takes {said}: {entry.algorithm}")
    return compared


def _kind(shape: Shape) -> Variant:
    """What decides about the kernels of either algorithm."""
    dropout = shape.dropout_p > 0
    return Variant(
        "", shape.dtype, shape.factors or shape.dtype, shape.r, dropout,
        small_m=rows_of_small_m(shape.m, dropout),
        aligned=shape.k * shape.dtype.itemsize % 16 == 0,
    )  # fmt: skip


def _right(kind: Variant, device: torch.device, write: Callable[[str], None]) -> list[str]:
    """The algorithms whose results are right for products of a kind, against float64."""
    found = []
    for name in check.ALGORITHMS:
        variant = kind._replace(launcher=name)
        try:
            check.verify((variant, device.type))
            found.append(name)
        except Exception as error:  # whatever it is, the other algorithm is left
            write(f"  {variant} is not used: {workers.reason(error)}")
    return found


def _ratio(shape: Shape, mode: str, right: Sequence[str], seconds: float) -> rows.Ratio | None:
    """The time of fused over that of addmm; None if one of them is not right."""
    if len(right) < len(check.ALGORITHMS):
        return None
    steps = {name: _step(shape, mode, name) for name in check.ALGORITHMS}
    clock = stopwatch.stopwatch_of(shape.device, hide_launch=True)
    samples = stopwatch.interleave(steps, seconds, clock)
    return rows.paired_ratio(samples["fused"], samples["addmm"])


def _step(shape: Shape, mode: str, algorithm: str) -> stopwatch.Step:
    p = shape.problem()
    operands = (p.x, p.w, p.a, p.b)
    _, h = linear.lora_linear_forward(algorithm, *operands, None, p.seed, p.spec)
    if mode == FORWARD:
        step = stopwatch.Step(
            lambda: linear.lora_linear_forward(algorithm, *operands, None, p.seed, p.spec)
        )
    else:
        needs = Needs(x=True, a=True, b=True)
        arguments = (p.dy, p.x, h, p.w, p.a, p.b, p.seed, p.spec, needs)
        step = stopwatch.Step(lambda: linear.lora_linear_backward(algorithm, *arguments))
    return stopwatch.capture(step, draws=False) if p.x.is_cuda else step


def _entry(
    plan: Plan, shape: Shape, mode: str, ratio: rows.Ratio | None, right: Sequence[str]
) -> TuningEntry | None:
    """What a comparison says of products like this one; None if no algorithm is right.

    n, k and r are exact. m reaches half of the way, in factors, to the neighbours that are tuned,
    and by a factor of two beyond the first and the last, as far as the same kernels run. Within the
    noise the usual choice stays.
    """
    if not right:
        return None
    asked = GemmShape(
        shape.m, shape.n, shape.k, shape.r, shape.dtype, plan.device,
        dropout=shape.dropout_p > 0, backward=mode == BACKWARD, uniform=shape.factors is None,
    )  # fmt: skip
    if ratio is None:
        (algorithm,) = right
    elif rows.faster(ratio):
        algorithm = "fused"
    else:
        algorithm = "addmm" if ratio[1] > 1 else unmeasured(asked)
    around = _around(shape.m, plan.tokens)
    if mode == FORWARD:
        around = with_same_kernels(shape.m, around, asked.dropout)
    return TuningEntry(
        capability_of(plan.device),
        shape.dtype,
        algorithm,
        measured.SOURCE,
        m=around,
        n=(shape.n, shape.n),
        k=(shape.k, shape.k),
        r=(shape.r, shape.r),
        dropout=asked.dropout,
        tma=None,
        backward=asked.backward,
        uniform=asked.uniform,
    )


def _around(m: int, tokens: Sequence[int]) -> tuple[int, int]:
    below = max((other for other in tokens if other < m), default=m / 4)
    above = min((other for other in tokens if other > m), default=m * 4)
    return math.ceil(math.sqrt(below * m)), math.floor(math.sqrt(above * m))
