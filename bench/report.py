"""``python -m bench.report FILE.json ...``: rows to summary.json, the README's table, and plots.

The files are those of one commit, and of one that is committed. What is made lies beside the first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import ceilings, plots, repository, roofline, rows, summary
from bench.providers import FLOOR, FUSED, OURS, SANDWICH
from bench.shapes import BOTH

__all__ = ["main", "markdown", "predicted", "terminal"]

# The scheme of roofline.py that each provider follows. Without dropout PEFT and loralib have fewer
# passes than the modelled ones.
SCHEMES = {
    "peft": "peft", "loralib": "peft", "sandwich": "sandwich", "unsloth": "unsloth",
    OURS: "split", FUSED: "split", SANDWICH: "sandwich",
}  # fmt: skip
DROPOUT_ONLY = ("peft", "loralib")


def predicted(row: Mapping) -> float | None:
    """The modelled time of a row over the frozen layer's, on its machine as measured."""
    scheme = SCHEMES.get(row["provider"])
    if row["provider"] in DROPOUT_ONLY and row["dropout_p"] == 0:
        scheme = None
    linear = row["kind"] == "layer" and len(row["enable_lora"]) == 1
    part = ceilings.part(row)
    if scheme is None or part is None or not linear or row["mode"] != BOTH:
        return None
    return roofline.ratio(
        scheme, row["m"], row["k"], row["n"], row["r"], part, rows.ELEMENT_BYTES[row["dtype"]]
    )  # fmt: skip


def terminal(measured: Sequence[Mapping]) -> str:
    """All rows as text: lost cells, then what was not measured and why, then the table.

    The cells lost to a peer come first there too, marked with an exclamation mark.
    """
    losses = [row for row in measured if rows.lost(row)]
    cells = {row["cell"] for row in measured}
    lines = [
        f"cells lost to a peer: {len({row['cell'] for row in losses})} of {len(cells)}",
        *(f"  {row['cell']}: {row['provider']}" for row in losses),
        *_not_measured(measured),
        *_ceilings(measured),
        "",
    ]
    timed = [row for row in rows.losses_first(measured) if not row["withheld"]]
    wide = max(len(cell) for cell in cells)
    name = max(len(row["provider"]) for row in measured)
    lines.append(
        f"{'cell':{wide}} {'provider':{name}} {'median ms':>9} {'p10':>8} {'p90':>8} "
        f"{'/frozen':>8} {'model':>6} {'saved MB':>8}  ours/peer (99 %)"
    )
    previous = None
    for row in timed:
        cell = row["cell"] if row["cell"] != previous else ""
        mark = " !" if rows.lost(row) else ""
        lines.append(
            f"{cell:{wide}} {row['provider']:{name}} {row['median_ms']:9.3f} {row['p10_ms']:8.3f} "
            f"{row['p90_ms']:8.3f} {_number(row['over_frozen'], '8.3f')} "
            f"{_number(predicted(row), '6.2f')} {_megabytes(row['saved_bytes'])}  "
            f"{rows.in_words(row['ours_over_peer'])}{mark}".rstrip()
        )
        previous = row["cell"]
    return "\n".join(lines + _models(timed))


def _not_measured(measured: Iterable[Mapping]) -> list[str]:
    """Each provider and reason once, with the number of cells."""
    counts: dict[str, int] = {}
    for row in measured:
        if row["withheld"]:
            text = f"  {row['provider']}: {row['withheld']}"
            counts[text] = counts.get(text, 0) + 1
    return ["not measured:", *(f"{text} ({n} cells)" for text, n in counts.items())] * bool(counts)


def _ceilings(measured: Sequence[Mapping]) -> list[str]:
    row = measured[0]
    if row["copy_tb_s"] is None:
        return []
    return [
        f"ceilings: copy {row['copy_tb_s']:.3f} TB/s, product {row['product_tflop_s']:.3f} "
        f"TFLOP/s, launch {row['launch_us']:.2f} us"
    ]


def _models(timed: Iterable[Mapping]) -> list[str]:
    lines = []
    for row in timed:
        if row["kind"] == "model":
            peak = _megabytes(row["peak_bytes"]).strip()
            lines.append(
                f"  {row['cell']}, {row['provider']}: {summary.tokens_per_second(row):.0f} tokens/s"
                + (f", peak {peak} MB" if peak else "")
            )
    return ["", "whole models, forward + backward:", *lines] if lines else []


def _number(value: float | None, form: str) -> str:
    width = int(form.partition(".")[0])
    return " " * width if value is None else format(value, form)


def _megabytes(count: int | None) -> str:
    return _number(None if count is None else count / 1e6, "8.2f")


def markdown(measured: Sequence[Mapping]) -> str:
    """The README's table: forward + backward of every cell, lost cells first.

    Each entry: the median in ms, and behind it the time over the frozen layer's.
    """
    kept = [row for row in rows.losses_first(measured) if row["mode"] == BOTH]
    providers = list(dict.fromkeys(row["provider"] for row in kept))
    ordered = [*(name for name in providers if not rows.is_ours(name)),
               *(name for name in providers if rows.is_ours(name))]  # fmt: skip
    lines = [
        f"| forward + backward, ms (over frozen) | {' | '.join(ordered)} |",
        "|---" * (len(ordered) + 1) + "|",
    ]
    for cell in dict.fromkeys(row["cell"] for row in kept):
        by_name = {row["provider"]: row for row in kept if row["cell"] == cell}
        entries = [_entry(by_name.get(name)) for name in ordered]
        lines.append(f"| {cell.replace(f' {BOTH}', '')} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _entry(row: Mapping | None) -> str:
    if row is None:
        return "-"
    if row["withheld"]:
        return "withheld"
    text = f"{row['median_ms']:.3g}"
    if row["provider"] == FLOOR:
        return text
    won = "**" if rows.lost(row) else ""  # bold: this peer is faster
    return f"{won}{text} ({row['over_frozen']:.2f}){won}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    files = parser.parse_args(arguments).files
    measured = [row for file in files for row in rows.load(file)]
    commits = {row["commit"] for row in measured}
    try:
        if len(commits) != 1:
            raise ValueError(f"rows of one commit are needed, got {sorted(commits)}")
        repository.require_clean(*commits)
    except (ValueError, repository.DirtyTreeError) as error:
        print(error, file=sys.stderr)
        return 1
    folder = files[0].parent
    text = json.dumps(summary.summarise(measured, [file.name for file in files]), indent=1)
    (folder / "summary.json").write_text(text + "\n")
    (folder / "table.md").write_text(markdown(measured) + "\n")
    drawn = plots.draw(measured, folder)
    print(terminal(measured))
    print(summary.table(summary.goals(measured)))
    print("\n".join(str(path) for path in (folder / "summary.json", folder / "table.md", *drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
