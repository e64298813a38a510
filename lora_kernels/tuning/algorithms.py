"""``python -m lora_kernels.tuning.algorithms FILE.json ...``: where fused beats addmm, as a TABLE.

It prints the TABLE of dispatch/table.py. The files hold cells of a GPU in which both algorithms
were measured, as by::

    pytest bench/ --shapes llama3-8b --mode forward,backward --execution graph \\
        --peers 'lora_kernels[fused],lora_kernels[addmm]' --bench-record

Layers under CUDA graphs decide: mode forward for the forward, mode backward for the backward. Whole
steps and eager calls are shown beside them: the time of a step less that of its forward is not a
measurement of the backward.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.dispatch.algorithm import unmeasured
from lora_kernels.dispatch.table import GemmShape, TuningEntry
from lora_kernels.dispatch.tma import is_tma_compliant
from lora_kernels.tuning import repository, rows
from lora_kernels.tuning.rows import ADDMM, BACKWARD, FORWARD, FUSED, GRAPH

__all__ = ["load", "main", "python", "table", "terminal"]

Rows = Sequence[Mapping]
Interval = tuple[float, float]
WIDTH = 100  # of a line of code


def load(files: Iterable[Path]) -> list[dict]:
    """The rows of algorithm fused in all files, with their file's name as ``source``.

    A file under bench/results is named with its folder, the GPU.
    Raises: ValueError if a row is not one of a GPU, or does not say of which capability;
    DirtyTreeError if it is not of a commit.
    """
    results = (repository.REPOSITORY / repository.RESULTS).resolve()
    measured = []
    for file in files:
        path = file.resolve()
        source = str(path.relative_to(results)) if path.is_relative_to(results) else path.name
        for row in rows.load(file):
            if row["device"] != "cuda":
                raise ValueError(f"{file}: rows of a GPU are needed, got one of {row['device']}")
            repository.require_clean(row["commit"])
            if row["capability"] is None:
                raise ValueError(f"{file}: a row does not say the GPU's capability")
            if row["implementation"] == FUSED and row["kind"] == "layer":
                measured.append({**row, "source": source})
    return measured


def terminal(measured: Rows) -> str:
    """Each cell as text: the ratio with its 99 % interval, and what wins if the cell decides."""
    wide = max(len(row["cell"]) for row in measured)
    lines = [f"{'cell':{wide}}  {'fused/addmm (99 %)':21}  algorithm"]
    for row in measured:
        algorithm = ("addmm", "fused")[_wins(row)] if _decides(row) else ""
        lines.append(f"{row['cell']:{wide}}  {_ratio(row):21}  {algorithm}".rstrip())
    return "\n".join(lines)


def _ratio(row: Mapping) -> str:
    ratio = row["fused_over_addmm"]
    if ratio is None:
        return row["skipped"] or f"no {ADDMM}"
    return rows.ratio_text(ratio)


def _decides(row: Mapping) -> bool:
    return row["execution"] == GRAPH and row["mode"] in (FORWARD, BACKWARD)


def _wins(row: Mapping) -> bool:
    """Whether fused is faster beyond doubt. If either algorithm was skipped it is not."""
    return rows.faster(row["fused_over_addmm"])


def table(measured: Rows) -> list[TuningEntry]:
    """Entries of dispatch's TABLE: they hold for every product measured that fused is faster at.

    If it is not, though it is what a product takes that was not measured, an entry says addmm.
    n and k are exact. m and r reach from a measurement to its neighbours if these agree, and m
    without end if the two largest do; they pass over no measurement that says otherwise. Layers
    of one product, such as a plain one and a merged one, have to agree.
    """
    deciding = [(_shape(row), row) for row in measured if _decides(row)]
    faster: dict[tuple, dict[int, dict[int, bool]]] = {}  # [capability, layer and pass][r][m]
    for shape, row in deciding:
        key = (*row["capability"],), shape._replace(m=0, r=0)
        by_tokens = faster.setdefault(key, {}).setdefault(shape.r, {})
        by_tokens[shape.m] = by_tokens.get(shape.m, True) and _wins(row)
    made = []
    for (capability, shape), by_rank in faster.items():
        slower = {
            r: {
                m: unmeasured(shape._replace(m=m, r=r)) == "fused" and not verdict
                for m, verdict in by_tokens.items()
            }
            for r, by_tokens in by_rank.items()
        }
        made += [
            TuningEntry(
                capability,
                shape.dtype,
                algorithm,
                "",
                m=m,
                n=(shape.n,) * 2,
                k=(shape.k,) * 2,
                r=r,
                dropout=shape.dropout,
                tma=shape.tma,
                backward=shape.backward,
                uniform=shape.uniform,
            )
            for algorithm, verdicts in (("fused", by_rank), ("addmm", slower))
            for m, r in _bounds(verdicts)
        ]
    for flag in ("dropout", "backward", "uniform"):
        made = _either(made, flag)
    return [dataclasses.replace(entry, source=_source(entry, deciding)) for entry in made]


def _shape(row: Mapping) -> GemmShape:
    m, n, k, dtype = row["m"], row["n"], row["k"], getattr(torch, row["dtype"])
    backward = row["mode"] == BACKWARD
    x_or_dy, w = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((m, n if backward else k), (n, k))
    )
    return GemmShape(
        m,
        n,
        k,
        row["r"],
        dtype,
        torch.device("cuda"),
        dropout=row["dropout_p"] > 0,
        tma=is_tma_compliant(x_or_dy, w),
        backward=backward,
        uniform=row["factors"] in (None, row["dtype"]),
    )


def _bounds(by_rank: Mapping[int, Mapping[int, bool]]) -> list[tuple[Interval, Interval]]:
    """Of m and of r: they hold every (r, m) whose verdict is True, and none whose is False."""
    tokens = {r: _tokens(verdicts) for r, verdicts in by_rank.items()}
    return [
        (m, r)
        for m in dict.fromkeys(itertools.chain.from_iterable(tokens.values()))
        for r in _runs({r: m in intervals for r, intervals in tokens.items()})
    ]


def _tokens(verdicts: Mapping[int, bool]) -> list[Interval]:
    runs = _runs(verdicts)
    largest = sorted(verdicts)[-2:]
    if len(largest) == 2 and all(verdicts[m] for m in largest):
        runs[-1] = runs[-1][0], math.inf
    return runs


def _runs(verdicts: Mapping[int, bool]) -> list[Interval]:
    """The first and the last of neighbours that are True, run by run."""
    runs: list[Interval] = []
    for verdict, group in itertools.groupby(sorted(verdicts), verdicts.__getitem__):
        first, *others = group
        if verdict:
            runs.append((first, (others or [first])[-1]))
    return runs


def _either(made: Iterable[TuningEntry], flag: str) -> list[TuningEntry]:
    """Two entries that differ in a flag alone are one for either of its values."""
    found: dict[TuningEntry, list[TuningEntry]] = {}
    either: dict[str, Any] = {flag: None}
    for entry in made:
        found.setdefault(dataclasses.replace(entry, **either), []).append(entry)
    return [merged if len(of) == 2 else of[0] for merged, of in found.items()]


def _source(entry: TuningEntry, deciding: Iterable[tuple[GemmShape, Mapping]]) -> str:
    """The files of what an entry holds for."""
    return ", ".join(
        dict.fromkeys(
            row["source"] for shape, row in deciding if entry.holds(shape, (*row["capability"],))
        )
    )


def python(made: Sequence[TuningEntry]) -> str:
    """The definition of TABLE in dispatch/table.py that these entries are."""
    if not made:
        return "TABLE: tuple[TuningEntry, ...] = ()"
    body = "".join(f"    TuningEntry(\n{_arguments(entry)}\n    ),\n" for entry in made)
    return f"TABLE: tuple[TuningEntry, ...] = (\n{body})  # fmt: skip"


def _arguments(entry: TuningEntry) -> str:
    """As many in a line as fit; those that have their default are left out."""
    texts = [
        str(entry.capability),
        str(entry.dtype),
        json.dumps(entry.algorithm),
        json.dumps(entry.source),
    ]
    for field in dataclasses.fields(entry)[len(texts) :]:
        value = getattr(entry, field.name)
        if value != field.default:
            texts.append(f"{field.name}={value}".replace("inf", "math.inf"))
    # Lines end between arguments, not within one.
    joined = ", ".join(text.replace(" ", "\0") for text in texts) + ","
    indent = " " * 8
    return textwrap.fill(
        joined,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\0", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each cell and the table; 1 if the files cannot serve."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels.tuning.algorithms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    try:
        measured = load(parser.parse_args(arguments).files)
        if not measured:
            raise ValueError(f"no cell holds {FUSED}")
    except (ValueError, repository.DirtyTreeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(terminal(measured), python(table(measured)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
