"""A launcher at a shape: its candidates are checked against float64 and timed, interleaved."""

import dataclasses
import gc
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.checks import dtype_name
from lora_kernels.kernels.config import Config, When, target_of
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import LAUNCHERS, Dims, Kernel, entry_for, kernel_of
from lora_kernels.kernels.selfcheck import wrong_result
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.tuning import candidates, rows, stopwatch, workers
from lora_kernels.tuning.candidates import AXES, in_words, source
from lora_kernels.tuning.shapes import Shape

__all__ = [
    "CONFIRM", "SCREEN", "Case", "by_entry", "cases", "measure", "report", "try_out",
]  # fmt: skip

BEST = 5  # how many of a case are shown
SCREEN, CONFIRM = "screen", "confirm"


@dataclass(frozen=True)
class Case:
    """A launcher at a shape: what its table has for it, and what is tried besides.

    when, table: the entry of the table that the launcher takes at the shape.
    """

    name: str
    shape: Shape
    when: When
    table: Config
    others: tuple[Config, ...]

    @property
    def kernel(self) -> Kernel:
        """The launcher's kernel; the table is in the file of its name."""
        return kernel_of(self.name)

    @property
    def entry(self) -> str:
        """Which entry of which table is tuned, for people."""
        target = target_of(torch.device(self.shape.device))
        return f"{self.kernel.name}.py {target} ({in_words(self.when)})"

    @property
    def configs(self) -> tuple[Config, ...]:
        """The table's own, then the others."""
        return self.table, *self.others

    def fields(self) -> dict:
        """What a row says of the case; None for what makes no difference to it."""
        needed = LAUNCHERS[self.name].depends_on.split()
        return {
            "kernel": self.name,
            "table": self.kernel.name,
            "entry": in_words(self.when),
            **{
                field: getattr(self.shape, field) if axis in needed else None
                for axis, field in AXES.items()
            },
            "dtype": self.shape.dtype_name,
            "factors": None if self.shape.factors is None else dtype_name(self.shape.factors),
            "device": self.shape.device,
        }

    def __str__(self) -> str:
        needed = LAUNCHERS[self.name].depends_on.split()
        axes = [f"{axis}{getattr(self.shape, AXES[axis]):g}" for axis in needed]
        factors = self.shape.factors
        dtypes = self.shape.dtype_name + ("" if factors is None else f"/{dtype_name(factors)}")
        return " ".join([self.name, *axes, dtypes])


def cases(names: Sequence[str], shapes: Sequence[Shape], limit: int | None) -> list[Case]:
    """Each launcher at each shape that differs for it, with at most limit candidates."""
    found = {}
    for name, shape in itertools.product(names, shapes):
        shape = candidates.without_unused(name, shape)
        if (name, shape) in found:
            continue
        o = candidates.operands(shape)
        if not LAUNCHERS[name].supports(o):
            continue
        when, table = entry_for(name, o)
        grid = candidates.grid(name, shape, when)
        known = candidates.as_run(name, shape, table)
        others = [config for config in grid if candidates.as_run(name, shape, config) != known]
        found[name, shape] = Case(name, shape, when, table, tuple(candidates.thin(others, limit)))
    return list(found.values())


def by_entry(found: Sequence[Case]) -> list[list[Case]]:
    """The cases of each entry of each table."""
    groups: dict[tuple[str, When], list[Case]] = {}
    for case in found:
        groups.setdefault((case.kernel.name, case.when), []).append(case)
    return list(groups.values())


def try_out(
    found: Sequence[Case], jobs: int, seconds: float = math.inf
) -> dict[Case, dict[Config, str]]:
    """Compiles and launches all configurations; of each case those that fail, and why.

    jobs, seconds: as workers.attempt has them.
    """
    tasks = [(case.name, case.shape, config) for case in found for config in case.configs]
    reasons = iter(workers.attempt(candidates.try_out, tasks, jobs, seconds=seconds))
    return {
        case: {config: why for config in case.configs if (why := next(reasons))} for case in found
    }


def measure(
    case: Case,
    configs: Sequence[Config],
    failed: Mapping[Config, str],
    seconds: float,
    stage: str = SCREEN,
) -> tuple[list[dict], dict[Config, list[float]]]:
    """A row for each configuration and the seconds of those that could be timed, interleaved.

    failed: those that are known not to run, and why.
    """
    o = candidates.operands(case.shape)
    formula, dtype = LAUNCHERS[case.name].formula, case.shape.dtype
    exact, baseline = (formula(o, t) for t in (torch.float64, dtype))
    steps, skipped = {}, dict(failed)
    for config in configs:
        if config in skipped:
            continue
        asked = None if config == case.table else config  # what the table says is asked of it
        try:
            fault = _fault(case.name, o, asked, exact, baseline)
            if fault:
                skipped[config] = fault
            else:
                steps[config] = _step(case.name, o, asked)
        except Exception as error:  # whatever a candidate does, the others are timed
            skipped[config] = workers.reason(error)
    samples = stopwatch.interleave(
        steps, seconds, stopwatch.stopwatch_of(case.shape.device, hide_launch=True)
    )
    made = [_row(case, config, samples, skipped.get(config), stage) for config in configs]
    del o, exact, baseline, steps
    if case.shape.device == "cuda":  # graphs hold the memory of their outputs
        gc.collect()
        torch.cuda.empty_cache()
    return made, samples


def _fault(
    name: str, o: Operands, config: Config | None, exact: Sequence[Tensor], baseline: Sequence
) -> str | None:
    """What is wrong with the results."""
    try:
        with guarded_outputs():
            outputs = LAUNCHERS[name](o, config)
    except AssertionError as error:
        return f"wrong: {error}"
    return wrong_result(outputs, exact, baseline)


def _step(name: str, o: Operands, config: Config | None) -> stopwatch.Step:
    step = stopwatch.Step(lambda: LAUNCHERS[name](o, config))
    return stopwatch.capture(step, draws=False) if o.x.is_cuda else step


def _row(
    case: Case,
    config: Config,
    samples: Mapping[Config, Sequence[float]],
    fault: str | None,
    stage: str,
) -> dict:
    row = {
        **case.fields(),
        "stage": stage,
        "config": {"type": type(config).__name__, **dataclasses.asdict(config)},
        "is_table": config == case.table,
        "rounds": 0,
        **dict.fromkeys(("p10_ms", "median_ms", "p90_ms", "over_table", "gb_s", "tflop_s")),
        "reason": fault,
    }
    if config in samples:
        p10, median, p90 = rows.quantiles(samples[config])
        s, launcher = case.shape, LAUNCHERS[case.name]
        dims = Dims(s.m, s.k, s.n, s.r, s.dtype.itemsize)
        row |= {
            "rounds": len(samples[config]),
            "p10_ms": p10 * 1e3,
            "median_ms": median * 1e3,
            "p90_ms": p90 * 1e3,
            "gb_s": launcher.moved(dims) / median / 1e9,
            "tflop_s": launcher.flops(dims) / median / 1e12,
        }
        if case.table in samples:
            row["over_table"] = rows.paired_ratio(samples[config], samples[case.table])
    return row


def report(case: Case, measured: Sequence[Mapping], configs: Sequence[Config]) -> str:
    """The table's configuration, the best of the others, and what has no time and why."""
    pairs = list(zip(measured, configs, strict=True))
    timed = [pair for pair in pairs if pair[0]["rounds"]]
    best = sorted(
        (pair for pair in timed if not pair[0]["is_table"]), key=lambda pair: pair[0]["median_ms"]
    )
    lines = [f"{case}, {case.entry}: {len(timed)} of {len(pairs)} timed"]
    for row, config in [*(pair for pair in timed if pair[0]["is_table"]), *best[:BEST]]:
        ratio = "table" if row["is_table"] else rows.ratio_text(row["over_table"])
        product = f" {row['tflop_s']:7.1f} TFLOP/s" if case.kernel.is_gemm else ""
        lines.append(
            f"  {row['median_ms'] * 1e3:9.2f} us {row['gb_s']:7.0f} GB/s{product}  {ratio:19}  "
            f"{source(config)}"
        )
    lines += [
        f"  no time: {source(config)}: {row['reason']}"
        for row, config in pairs
        if not row["rounds"]
    ]
    return "\n".join(lines)
