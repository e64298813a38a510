"""``python -m bench.plans FILE.json ...``: where plan fused beats sandwich, as plan.py's TABLE.

The files hold cells of a GPU in which both plans were measured, as by::

    pytest bench/ --shapes llama3-8b --mode forward,backward --execution graph \\
        --peers 'lora_kernels[fused],lora_kernels[sandwich]' --bench-record

Layers under CUDA graphs decide: mode forward for the forward, mode backward for the backward. Whole
steps and eager calls are shown beside them: the time of a step less that of its forward is no
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

import torch

from bench import repository, rows
from bench.providers import FUSED, SANDWICH
from bench.shapes import BACKWARD, FORWARD, GRAPH
from lora_kernels.plan import Measured, Product, aligned, unmeasured

__all__ = ["load", "main", "python", "table", "terminal"]

Rows = Sequence[Mapping]
Interval = tuple[float, float]
WIDTH = 100  # of a line of code


def load(files: Iterable[Path]) -> list[dict]:
    """The rows of plan fused in all files, with their file's name as ``source``.

    A file under bench/results is named with its folder, the GPU.
    Raises: ValueError where a row is none of a GPU, or does not say of which capability;
    DirtyTreeError where it is of no commit.
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
            if row["provider"] == FUSED and row["kind"] == "layer":
                measured.append({**row, "source": source})
    return measured


def terminal(measured: Rows) -> str:
    """Each cell as text: the ratio with its 99 % interval, and the plan where the cell decides."""
    wide = max(len(row["cell"]) for row in measured)
    lines = [f"{'cell':{wide}}  {'fused/sandwich (99 %)':21}  plan"]
    for row in measured:
        plan = ("sandwich", "fused")[_faster(row)] if _decides(row) else ""
        lines.append(f"{row['cell']:{wide}}  {_ratio(row):21}  {plan}".rstrip())
    return "\n".join(lines)


def _ratio(row: Mapping) -> str:
    ratio = row["fused_over_sandwich"]
    if ratio is None:
        return row["withheld"] or f"no {SANDWICH}"
    return rows.in_words(ratio)


def _decides(row: Mapping) -> bool:
    return row["execution"] == GRAPH and row["mode"] in (FORWARD, BACKWARD)


def _faster(row: Mapping) -> bool:
    """Whether fused is faster beyond doubt. Where either plan was withheld it is not."""
    ratio = row["fused_over_sandwich"]
    return ratio is not None and ratio[2] < 1


def table(measured: Rows) -> list[Measured]:
    """Rows for plan.TABLE: they hold for every product measured that fused is faster at.

    Where it is not, though it is what a product takes that was not measured, a row says sandwich.
    n and k are exact. m and r reach from a measurement to its neighbours where these agree, and m
    without end where the two largest do; they pass over no measurement that says otherwise. Layers
    of one product, such as a plain one and a merged one, have to agree.
    """
    deciding = [(_product(row), row) for row in measured if _decides(row)]
    faster: dict[tuple, dict[int, dict[int, bool]]] = {}  # [capability, layer and pass][r][m]
    for product, row in deciding:
        key = (*row["capability"],), product._replace(m=0, r=0)
        by_tokens = faster.setdefault(key, {}).setdefault(product.r, {})
        by_tokens[product.m] = by_tokens.get(product.m, True) and _faster(row)
    made = []
    for (capability, product), by_rank in faster.items():
        slower = {
            r: {
                m: unmeasured(product._replace(m=m, r=r)) == "fused" and not verdict
                for m, verdict in by_tokens.items()
            }
            for r, by_tokens in by_rank.items()
        }
        made += [
            Measured(
                capability, product.dtype, plan, "", m=m, n=(product.n,) * 2, k=(product.k,) * 2,
                r=r, dropout=product.dropout, aligned=product.aligned, backward=product.backward,
            )
            for plan, verdicts in (("fused", by_rank), ("sandwich", slower))
            for m, r in _bounds(verdicts)
        ]  # fmt: skip
    for flag in ("dropout", "backward"):
        made = _either(made, flag)
    return [dataclasses.replace(row, source=_source(row, deciding)) for row in made]


def _product(row: Mapping) -> Product:
    m, n, k, dtype = row["m"], row["n"], row["k"], getattr(torch, row["dtype"])
    backward = row["mode"] == BACKWARD
    x_or_dy, w = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((m, n if backward else k), (n, k))
    )
    return Product(
        m, n, k, row["r"], dtype, torch.device("cuda"), dropout=row["dropout_p"] > 0,
        aligned=aligned(x_or_dy, w), backward=backward,
    )  # fmt: skip


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
    runs = []
    for verdict, group in itertools.groupby(sorted(verdicts), verdicts.__getitem__):
        first, *others = group
        if verdict:
            runs.append((first, (others or [first])[-1]))
    return runs


def _either(made: Iterable[Measured], flag: str) -> list[Measured]:
    """Two rows that differ in a flag alone are one for either of its values."""
    found: dict[Measured, list[Measured]] = {}
    for row in made:
        found.setdefault(dataclasses.replace(row, **{flag: None}), []).append(row)
    return [merged if len(of) == 2 else of[0] for merged, of in found.items()]


def _source(made: Measured, deciding: Iterable[tuple[Product, Mapping]]) -> str:
    """The files of what a row holds for."""
    return ", ".join(
        dict.fromkeys(
            row["source"] for product, row in deciding if made.holds(product, (*row["capability"],))
        )
    )


def python(made: Sequence[Measured]) -> str:
    """The definition of TABLE in plan.py that these rows are."""
    if not made:
        return "TABLE: tuple[Measured, ...] = ()"
    body = "".join(f"    Measured(\n{_arguments(row)}\n    ),\n" for row in made)
    return f"TABLE: tuple[Measured, ...] = (\n{body})  # fmt: skip"


def _arguments(row: Measured) -> str:
    """As many in a line as fit, those left out that have their default."""
    texts = [str(row.capability), str(row.dtype), json.dumps(row.plan), json.dumps(row.source)]
    for field in dataclasses.fields(row)[len(texts) :]:
        value = getattr(row, field.name)
        if value != field.default:
            texts.append(f"{field.name}={value}".replace("inf", "math.inf"))
    # Lines end between arguments, not within one.
    joined = ", ".join(text.replace(" ", "\0") for text in texts) + ","
    indent = " " * 8
    return textwrap.fill(
        joined, WIDTH, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    ).replace("\0", " ")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plans",
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
