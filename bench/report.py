"""``python -m bench.report FILE.json ...``: rows to summary.json, a table, and plots.

The files are those of one commit, and of one that is committed. What is made lies beside the first.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import plots, roofline, rows
from bench.implementations import FLOOR
from lora_kernels.tuning import repository
from lora_kernels.tuning.rows import BOTH, load, ratio_text

BUSY = 1.5  # p90 over p10 of a step

__all__ = ["main", "markdown", "summarise", "terminal", "tokens_per_second"]


def terminal(measured: Sequence[Mapping]) -> str:
    """All rows as text: lost cells, then what was skipped and why, then the table.

    The cells lost to a peer come first there too, marked with an exclamation mark.
    """
    losses = rows.losses(measured)
    outcomes = Counter(rows.outcomes(measured).values())
    timed = [row for row in rows.losses_first(measured) if not row["skipped"]]
    return "\n".join(
        [
            *_busy(timed),
            "cells: " + ", ".join(f"{outcomes[name]} {name}" for name in rows.OUTCOMES),
            *["lost to:"] * bool(losses),
            *(f"  {cell}: {name}" for cell, names in losses.items() for name in names),
            *_skipped(measured),
            "ceilings: copy {copy_tb_s:.3f} TB/s, product {product_tflop_s:.3f} TFLOP/s, "
            "launch {launch_us:.2f} us".format_map(measured[0]),
            "",
            *_table(timed),
            *_kernels(timed),
            *_models(timed),
        ]
    )


def _busy(timed: Sequence[Mapping]) -> list[str]:
    """A loud line if the same step took very different times, so that no figure is worth much."""
    spreads = [row["p90_ms"] / row["p10_ms"] for row in timed if row["implementation"] == FLOOR]
    spread = statistics.median(spreads) if spreads else 1.0
    if spread < BUSY:
        return []
    return [
        f"!!! THE MACHINE WAS BUSY: steps of the frozen layer differ by a factor of {spread:.1f}. "
        f"Measure again",
        "!!! with nothing else running: these figures say little.",
    ]


def _table(timed: Sequence[Mapping]) -> list[str]:
    """A line with the name of a cell, then a line for each implementation: 100 columns."""
    name = max(len("implementation"), *(len(row["implementation"]) for row in timed), 0) + 2
    lines = [
        f"{'  implementation':{name}} {'median ms':>9} {'p10':>8} {'p90':>8} "
        f"{'/frozen':>8} {'saved MB':>8}  ours/peer (99 %)"
    ]
    previous = None
    for row in timed:
        if row["cell"] != previous:
            lines.append(row["cell"])
        mark = " !" if rows.lost(row) else ""
        saved, ratio = _megabytes(row["saved_bytes"]), ratio_text(row["ours_over_peer"])
        frozen = "" if row["over_frozen"] is None else f"{row['over_frozen']:.3f}"
        lines.append(
            f"{'  ' + row['implementation']:{name}} {row['median_ms']:9.3f} "
            f"{row['p10_ms']:8.3f} {row['p90_ms']:8.3f} {frozen:>8} "
            f"{saved:>8}  {ratio}{mark}".rstrip()
        )
        previous = row["cell"]
    return lines


def _skipped(measured: Iterable[Mapping]) -> list[str]:
    """Each implementation and reason once, with the number of cells."""
    counts = Counter(
        f"  {row['implementation']}: {row['skipped']}" for row in measured if row["skipped"]
    )
    return ["skipped:", *(f"{text} ({n} cells)" for text, n in counts.items())] * bool(counts)


def _kernels(timed: Iterable[Mapping]) -> list[str]:
    lines = [
        f"  {row['cell']}, {row['implementation']}: {work.name} {work.seconds * 1e6:.1f} us, "
        f"{work.fraction(row):.0%}"
        for row in timed
        for work in roofline.kernel_work(row)
    ]
    return ["", "kernels, of the ceiling of this run:", *lines] if lines else []


def _models(timed: Iterable[Mapping]) -> list[str]:
    lines = [
        f"  {row['cell']}, {row['implementation']}: {tokens_per_second(row):.0f} tokens/s"
        + (f", peak {_megabytes(row['peak_bytes'])} MB" if row["peak_bytes"] else "")
        for row in timed
        if row["kind"] == "model"
    ]
    return ["", "whole models, forward + backward:", *lines] if lines else []


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def tokens_per_second(row: Mapping) -> float:
    """Of a model's row; m is the number of tokens of its step."""
    return row["m"] / row["median_ms"] * 1e3


def markdown(measured: Sequence[Mapping]) -> str:
    """The table of docs/benchmarks.md: forward + backward of every cell, lost cells first.

    Each entry: the median in ms, and behind it the time over the frozen layer's.
    """
    kept = [row for row in rows.losses_first(measured) if row["mode"] == BOTH]
    names = sorted(dict.fromkeys(row["implementation"] for row in kept), key=rows.is_ours)
    lines = [
        f"| forward + backward, ms (over frozen) | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for cell in dict.fromkeys(row["cell"] for row in kept):
        by_name = {row["implementation"]: row for row in kept if row["cell"] == cell}
        entries = [_entry(by_name.get(name)) for name in names]
        lines.append(f"| {cell.replace(f' {BOTH}', '')} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _entry(row: Mapping | None) -> str:
    if row is None:
        return "-"
    if row["skipped"]:
        return "skipped"
    text = f"{row['median_ms']:.3g}"
    if row["implementation"] == FLOOR:
        return text
    won = "**" if rows.lost(row) else ""  # bold: this peer is faster
    return f"{won}{text} ({row['over_frozen']:.2f}){won}"


def summarise(measured: Sequence[Mapping], files: Sequence[str]) -> dict:
    """What summary.json holds: losses first, then models, what was skipped, the machine."""
    machine = ("commit", "gpu", "driver", "cpu", "threads", "python", "torch", "triton",
               "copy_tb_s", "product_tflop_s", "launch_us")  # fmt: skip
    losses = rows.losses(measured)

    def picked(row: Mapping, *fields: str) -> dict:
        return {field: row.get(field) for field in fields}

    return {
        "cells": len({row["cell"] for row in measured}),
        "cells_lost": len(losses),
        "lost": [{"cell": cell, "faster": names} for cell, names in losses.items()],
        "models": [
            {
                **picked(row, "cell", "implementation"),
                "tokens_per_second": tokens_per_second(row),
                "peak_bytes": row["peak_bytes"],
            }
            for row in measured
            if row["kind"] == "model" and not row["skipped"]
        ],
        "skipped": [
            picked(row, "cell", "implementation", "skipped") for row in measured if row["skipped"]
        ],
        "machine": picked(measured[0], *machine),
        "files": list(files),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and prints the table; 1 if the rows cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    files = parser.parse_args(arguments).files
    try:
        measured = [row for file in files for row in load(file)]
        commits = {row["commit"] for row in measured}
        if len(commits) != 1:
            raise ValueError(f"rows of one commit are needed, got {sorted(commits)}")
        repository.require_clean(*commits)
    except (ValueError, repository.DirtyTreeError) as error:
        print(error, file=sys.stderr)
        return 1
    folder = files[0].parent
    text = json.dumps(summarise(measured, [file.name for file in files]), indent=1)
    (folder / "summary.json").write_text(text + "\n")
    (folder / "table.md").write_text(markdown(measured) + "\n")
    drawn = plots.draw(measured, folder)
    print(terminal(measured))
    print("\n".join(str(path) for path in (folder / "summary.json", folder / "table.md", *drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
