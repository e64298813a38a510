"""``python -m bench.tune``: the fastest configuration of each kernel, against its table's.

Every candidate is compiled and launched in processes of their own, checked against float64 by the
one rule of the tests, and timed, all of a cell interleaved. What is best over the cells of an entry
of a table is timed once more, against that entry alone: of many candidates, one looks fast by
chance. Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), where times mean
nothing.
"""

import argparse
import dataclasses
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import candidates, cuda, machine, roofline, rows, shapes, timing, trial
from bench.candidates import LAUNCHERS, Config, source
from bench.options import listed
from bench.shapes import Cell, Layer
from lora_kernels.kernels.launch import target_of
from tests.kernels.expected import Operands
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.testing.tolerance import assert_close

__all__ = ["Case", "Verdict", "cases", "confirm", "main", "measure", "report"]

BEST = 5  # how many of a cell are shown
MOST_JOBS = 16  # each has operands on the GPU
SCREEN, CONFIRM = "screen", "confirm"


@dataclass(frozen=True)
class Defaults:
    """What is tuned on a device unless asked otherwise."""

    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    seconds: float
    limit: int | None


DEFAULTS = {
    "cuda": Defaults(tuple(shapes.LLAMA_3_8B), (8192,), (16,), seconds=1.0, limit=None),
    "cpu": Defaults((Layer(48, 40),), (32,), (4,), seconds=0.0, limit=3),
}
DROPOUT = (0.1,)


@dataclass(frozen=True)
class Case:
    """A launcher at a cell: what the table has for it, and what is tried besides."""

    name: str
    cell: Cell
    entry: str
    table: Config
    others: tuple[Config, ...]

    @property
    def module(self) -> str:
        """The kernel's file, which holds the table."""
        return LAUNCHERS[self.name].module.__name__.rpartition(".")[2]

    def fields(self) -> dict:
        """What a row says of the case; None for what makes no difference to it."""
        uses = LAUNCHERS[self.name].uses.split()
        axes = ("m", "k", "n", "r", "dropout_p")
        return {
            "kernel": self.name,
            "table": self.module,
            "entry": self.entry,
            **{axis: getattr(self.cell, axis) if axis in uses else None for axis in axes},
            "dtype": self.cell.dtype_name,
            "device": self.cell.device,
        }

    def __str__(self) -> str:
        fields = self.fields()
        short = {"m": "m", "k": "k", "n": "n", "r": "r", "dropout_p": "p"}
        axes = [f"{s}{fields[axis]:g}" for axis, s in short.items() if fields[axis] is not None]
        return " ".join([self.name, *axes, self.cell.dtype_name])


def cases(names: Sequence[str], cells: Sequence[Cell], limit: int | None) -> list[Case]:
    """Each launcher at each cell that it tells from the others, with at most limit candidates."""
    found = {}
    for name, cell in itertools.product(names, cells):
        cell = candidates.told_apart(name, cell)
        if (name, cell) in found:
            continue
        o = candidates.operands(cell)
        if not candidates.takes(name, o):
            continue
        entry, table = candidates.table_entry(name, o)
        # The other entries serve matrices that descriptors do not fit as well.
        grid = candidates.grid(name, cell, tma=entry.startswith("tma"))
        known = candidates.as_run(name, cell, table)
        others = [config for config in grid if candidates.as_run(name, cell, config) != known]
        found[name, cell] = Case(name, cell, entry, table, tuple(candidates.thin(others, limit)))
    return list(found.values())


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
    o = candidates.operands(case.cell)
    launcher, dtype = LAUNCHERS[case.name], case.cell.dtype
    exact, baseline = (launcher.expected(o, t) for t in (torch.float64, dtype))
    steps, withheld = {}, dict(failed)
    for config in configs:
        if config in withheld:
            continue
        asked = None if config == case.table else config  # what the table says is asked of it
        try:
            fault = _fault(case.name, o, asked, exact, baseline)
            if fault:
                withheld[config] = fault
            else:
                steps[config] = _step(case.name, o, asked)
        except Exception as error:  # whatever a candidate does, the others are timed
            withheld[config] = trial.reason(error)
    on_gpu = case.cell.device == "cuda"
    stopwatch = cuda.Events(hide_launch=True) if on_gpu else timing.wall_seconds
    samples = timing.interleave(steps, seconds, stopwatch) if steps else {}
    made = [_row(case, config, samples, withheld.get(config), stage) for config in configs]
    del o, exact, baseline, steps
    if on_gpu:  # graphs hold the memory of their outputs
        gc.collect()
        torch.cuda.empty_cache()
    return made, samples


def _fault(
    name: str, o: Operands, config: Config | None, exact: Sequence[Tensor], baseline: Sequence
) -> str | None:
    """What is wrong with the results; h and dh are judged in the dtype of the layer they serve."""
    try:
        with guarded_outputs():
            outputs = candidates.run(name, o, config)
        for output, *references in zip(outputs, exact, baseline, strict=True):
            assert_close(output.to(o.x.dtype), *references, what="result")
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def _step(name: str, o: Operands, config: Config | None) -> timing.Step:
    step = timing.Step(lambda: candidates.run(name, o, config))
    return cuda.capture(step, random=False) if o.x.is_cuda else step


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
        cell, element = case.cell, case.cell.dtype.itemsize
        flops, moved = roofline.WORK[case.name](cell.m, cell.k, cell.n, cell.r, element)
        row |= {
            "rounds": len(samples[config]),
            "p10_ms": p10 * 1e3,
            "median_ms": median * 1e3,
            "p90_ms": p90 * 1e3,
            "gb_s": moved / median / 1e9,
            "tflop_s": flops / median / 1e12,
        }
        if case.table in samples:
            row["over_table"] = rows.judged(samples[config], samples[case.table])
    return row


def report(case: Case, measured: Sequence[Mapping], configs: Sequence[Config]) -> str:
    """The table's configuration, the best of the others, and what has no time and why."""
    pairs = list(zip(measured, configs, strict=True))
    timed = [pair for pair in pairs if pair[0]["rounds"]]
    best = sorted(
        (pair for pair in timed if not pair[0]["is_table"]), key=lambda pair: pair[0]["median_ms"]
    )
    lines = [f"{case}, {case.module}.py {case.entry!r}: {len(timed)} of {len(pairs)} timed"]
    for row, config in [*(pair for pair in timed if pair[0]["is_table"]), *best[:BEST]]:
        ratio = "table" if row["is_table"] else rows.in_words(row["over_table"])
        product = f" {row['tflop_s']:7.1f} TFLOP/s" if LAUNCHERS[case.name].dots is None else ""
        lines.append(
            f"  {row['median_ms'] * 1e3:9.2f} us {row['gb_s']:7.0f} GB/s{product}  {ratio:19}  "
            f"{source(config)}"
        )
    lines += [f"  no time: {source(config)}: {row['reason']}" for row, config in pairs
              if not row["rounds"]]  # fmt: skip
    return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """The best configuration of a table's entry over its cells, against the entry.

    ratio: of the sums over the cells; None where the table's own cannot be timed.
    by_cell: of each cell.
    """

    place: str
    entry: str
    table: Config
    best: Config
    ratio: tuple[float, float, float] | None
    by_cell: tuple[float, ...]

    @property
    def faster(self) -> bool:
        """Beyond doubt."""
        return self.best != self.table and (self.ratio is None or self.ratio[2] < 1)

    @property
    def pasted(self) -> str:
        """The line of the table."""
        return f'"{self.entry}": {source(self.best)},'

    def __str__(self) -> str:
        if self.best == self.table:
            return f"{self.place}: keep {source(self.table)}, nothing looked faster"
        cells = ", ".join(f"{ratio:.3f}" for ratio in self.by_cell)
        took = f"{rows.in_words(self.ratio)} of the table's time (by cell: {cells})"
        if not self.faster:
            return f"{self.place}: keep {source(self.table)}; {source(self.best)} takes {took}"
        if self.ratio is None:
            took = "the table's own does not run"
        return f"{self.place}: {took}\n        {self.pasted}"


def confirm(
    group: Sequence[Case],
    samples: Sequence[Mapping[Config, Sequence[float]]],
    seconds: float,
) -> tuple[list[dict], Verdict | None]:
    """Times what is best over the cells of one entry again, with the table's alone.

    samples: the seconds of each case by configuration. None where nothing was timed in all cells.
    """
    case, best = group[0], _best(group, samples)
    if best is None:
        return [], None
    target = target_of(torch.device(case.cell.device))
    place = f"{case.module}.py {target} {case.entry}"
    verdict = Verdict(place, case.entry, case.table, best, (1.0, 1.0, 1.0), ())
    if best == case.table:
        return [], verdict
    measured, ours, table = [], [], []
    for each in group:
        made, times = measure(each, [each.table, best], {}, seconds, CONFIRM)
        measured += made
        if best not in times:
            return measured, None
        ours.append(times[best])
        table.append(times.get(each.table))
    if None in table:
        return measured, dataclasses.replace(verdict, ratio=None)
    by_cell = tuple(rows.judged(*pair)[0] for pair in zip(ours, table, strict=True))
    sums = ([sum(times) for times in zip(*cells, strict=False)] for cells in (ours, table))
    return measured, dataclasses.replace(verdict, ratio=rows.judged(*sums), by_cell=by_cell)


def _best(
    group: Sequence[Case], samples: Sequence[Mapping[Config, Sequence[float]]]
) -> Config | None:
    """The configuration of the least geometric mean, among those that were timed in every cell."""
    medians = [
        {candidates.as_run(case.name, case.cell, c): statistics.median(t) for c, t in times.items()}
        for case, times in zip(group, samples, strict=True)
    ]
    means = {}
    for config in dict.fromkeys(config for times in samples for config in times):
        same = [candidates.as_run(case.name, case.cell, config) for case in group]
        if all(each in known for each, known in zip(same, medians, strict=True)):
            pairs = zip(same, medians, strict=True)
            means[config] = statistics.geometric_mean(known[each] for each, known in pairs)
    return min(means, key=means.get, default=None)


def main(arguments: Sequence[str] | None = None) -> int:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    parser = _parser()
    options = parser.parse_args(arguments)
    if device == "cpu" and not interpreted:
        parser.error("without a GPU the kernels run under TRITON_INTERPRET=1 only")
    default = DEFAULTS[device]
    seconds = default.seconds if options.seconds is None else options.seconds
    planned = cases(options.kernels, _cells(device, options), options.limit or default.limit)
    if not planned:
        parser.error(f"{', '.join(options.kernels)} take none of these cells")

    start = time.perf_counter()
    tasks = [(case.name, case.cell, c) for case in planned for c in (case.table, *case.others)]
    print(f"{len(tasks)} launches in {options.jobs} processes", flush=True)
    reasons = trial.attempt(candidates.try_out, tasks, options.jobs)
    failed = {task: why for task, why in zip(tasks, reasons, strict=True) if why}
    print(f"{len(failed)} fail, {time.perf_counter() - start:.0f} s", flush=True)

    environment, kept, verdicts, complete = machine.describe(device), [], [], True

    def keep(measured: Sequence[Mapping]) -> None:
        kept.extend({**environment, **row} for row in measured)
        if options.output:  # after each cell: what is measured stays, whatever comes
            rows.save(kept, options.output)

    for group in _groups(planned):
        samples = []
        for case in group:
            configs = (case.table, *case.others)
            known = {c: why for (*at, c), why in failed.items() if at == [case.name, case.cell]}
            measured, times = measure(case, configs, known, seconds)
            keep(measured)
            print(report(case, measured, configs), flush=True)
            samples.append(times)
        measured, verdict = confirm(group, samples, seconds)
        keep(measured)
        if verdict:
            verdicts.append(verdict)
        else:
            complete = False
            print(f"{group[0].module}.py {group[0].entry!r}: nothing was timed in all cells")
    print(f"\ntables that are beaten: {sum(verdict.faster for verdict in verdicts)}")
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.faster):
        print(verdict)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__.partition("\n\n")[0],
        epilog="Lists are comma-separated.",
    )  # fmt: skip
    lists = {
        "--kernels": (listed(str, LAUNCHERS), list(LAUNCHERS), f"of {', '.join(LAUNCHERS)}"),
        "--shapes": (
            listed(str, shapes.SETS), [],
            f"sets of layers, of {', '.join(shapes.SETS)}; merged ones are left out",
        ),
        "--tokens": (listed(int), [], "numbers of tokens M"),
        "--ranks": (listed(int), [], "ranks r"),
        "--dropout": (listed(float), DROPOUT, "dropout probabilities p"),
    }  # fmt: skip
    for name, (kind, default, text) in lists.items():
        parser.add_argument(name, type=kind, default=default, metavar="LIST", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="most candidates of a cell")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="time to spend on a kernel at a cell"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, MOST_JOBS), metavar="N",
        help="processes that compile; 1 is this one, which does not survive a candidate that dies",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the rows")
    return parser


def _cells(device: str, options: argparse.Namespace) -> list[Cell]:
    default = DEFAULTS[device]
    layers = [layer for name in options.shapes for layer in shapes.SETS[name]] or default.layers
    chosen = itertools.product(
        [layer for layer in layers if len(layer.enable_lora) == 1],
        options.tokens or default.tokens, options.ranks or default.ranks, options.dropout,
    )  # fmt: skip
    return [
        Cell(m, layer.k, layer.n, r, p, shapes.BOTH, dtype=shapes.AXES[device].dtype, device=device)
        for layer, m, r, p in chosen
    ]


def _groups(planned: Sequence[Case]) -> list[list[Case]]:
    """The cases of each entry of each table."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in planned:
        groups.setdefault((case.module, case.entry), []).append(case)
    return list(groups.values())


if __name__ == "__main__":
    sys.exit(main())
