"""Pictures of rows: LoRA tax against M, the roofline, saved memory. Only of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import roofline
from bench.implementations import FLOOR
from lora_kernels.tuning.rows import ADDMM, BOTH, FUSED, GRAPH, OURS

__all__ = ["draw"]

COLOURS = {FLOOR: "0.4", "loralib": "tab:orange", "peft": "tab:red", "addmm": "tab:green",
           "unsloth": "tab:olive", "compiled peft": "tab:pink", "compiled formula": "tab:purple",
           OURS: "tab:blue", FUSED: "tab:cyan", ADDMM: "navy",
           f"{OURS}[reference]": "0.7"}  # fmt: skip


def draw(measured: Sequence[Mapping], folder: Path) -> list[Path]:
    """tax.png, roofline.png and memory.png, each if rows hold what it shows."""
    timed = [row for row in measured if row["kind"] == "layer" and not row["skipped"]]
    steps = [row for row in timed if row["mode"] == BOTH]
    linear = [row for row in steps if len(row["enable_lora"]) == 1]
    replayed = [row for row in linear if row["execution"] == GRAPH]
    linear = replayed or linear
    paths = []
    for name, figure, shown in (
        ("tax.png", _tax, linear),
        ("roofline.png", _roofline, linear),
        ("memory.png", _memory, [row for row in steps if row["saved_bytes"] is not None]),
    ):
        if shown:
            paths.append(folder / name)
            figure(shown).savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def _figure(panels: int = 1, width: float = 4.2):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(width * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes


def _machine(row: Mapping) -> str:
    return f"{row['gpu'] or row['cpu']}, {row['dtype']}, torch {row['torch']}"


def _names(shown: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(row["implementation"] for row in shown))


def _legend(figure, axes) -> None:
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, fontsize=8)


def _tax(linear: Sequence[Mapping]):
    """A panel per shape and rank, with dropout if that was measured; a line per implementation."""
    dropout = max(row["dropout_p"] for row in linear)
    kept = [row for row in linear if row["dropout_p"] == dropout and row["over_frozen"]]
    panels = list(dict.fromkeys((row["k"], row["n"], row["r"]) for row in kept))
    figure, axes = _figure(len(panels))
    for axis, (k, n, r) in zip(axes, panels, strict=False):
        here = [row for row in kept if (row["k"], row["n"], row["r"]) == (k, n, r)]
        for name in _names(here):
            points = sorted(
                (row["m"], row["over_frozen"]) for row in here if row["implementation"] == name
            )
            style = {"color": COLOURS.get(name), "marker": "o", "markersize": 4, "label": name}
            axis.plot(*zip(*points, strict=True), linewidth=2.4 if name == OURS else 1.2, **style)
        tokens = sorted({row["m"] for row in here})
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.minorticks_off()
        axis.set_title(f"{k}x{n}, r = {r}, dropout {dropout:g}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over frozen layer", fontsize=9)
    figure.suptitle(f"LoRA tax, forward + backward ({_machine(kept[0])})", fontsize=10)
    _legend(figure, axes)
    return figure


def _roofline(linear: Sequence[Mapping]):
    """Achieved FLOP/s against FLOPs a byte, under the two ceilings of the same run."""
    figure, (axis, *_) = _figure(width=7.5)
    first, seen, intensities = linear[0], set(), []
    for row in linear:
        step = roofline.step_work(row, floor=row["implementation"] == FLOOR)
        for work in (step, *roofline.kernel_work(row)):
            intensities.append(work.flops / work.moved)
            style = {"marker": "o" if work is step else "x", "alpha": 0.7, "linestyle": "none"}
            axis.plot(
                intensities[-1], work.flops / work.seconds / 1e12, markersize=5,
                label=None if work.name in seen else work.name, color=COLOURS.get(work.name),
                **style,
            )  # fmt: skip
            seen.add(work.name)
    flops, bandwidth = first["product_tflop_s"], first["copy_tb_s"]
    ends = sorted([min(intensities) / 2, flops / bandwidth, max(intensities) * 2])
    roof = [min(flops, bandwidth * intensity) for intensity in ends]
    axis.plot(ends, roof, color="black", linewidth=1, label="ceilings of this run")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte", fontsize=9)
    axis.set_ylabel("TFLOP/s achieved", fontsize=9)
    axis.set_title(f"Roofline, forward + backward ({_machine(first)})", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    _legend(figure, [axis])
    return figure


def _memory(steps: Sequence[Mapping]):
    """Bytes kept for the backward beyond x, over those of x, a group of bars per layer."""
    dropout = max(row["dropout_p"] for row in steps)
    kept = [row for row in steps if row["dropout_p"] == dropout]
    by_layer: dict[tuple[str, int], dict[str, Mapping]] = {}
    for row in sorted(kept, key=lambda row: row["m"]):  # of several numbers of tokens the largest
        merged = "merged " if len(row["enable_lora"]) > 1 else ""
        layer = f"{merged}{row['k']}x{row['n']}", row["r"]
        by_layer.setdefault(layer, {})[row["implementation"]] = row
    labels = [
        f"{layer}\nr = {r}, {max(row['m'] for row in here.values())} tokens"
        for (layer, r), here in by_layer.items()
    ]
    names = [name for name in _names(kept) if name != FLOOR]
    figure, (axis, *_) = _figure(width=max(6.0, 1.6 * len(by_layer)))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        shown = {at: rows[name] for at, rows in enumerate(by_layer.values()) if name in rows}
        heights = [
            row["saved_bytes"] / (row["m"] * row["k"] * roofline.element_bytes(row))
            for row in shown.values()
        ]
        places = [at + i * width for at in shown]
        axis.bar(places, heights, width, label=name, color=COLOURS.get(name))
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(by_layer))], labels, fontsize=8)
    axis.set_ylabel("saved beyond x, over x", fontsize=9)
    axis.set_title(f"Saved for backward, dropout {dropout:g} ({_machine(kept[0])})", fontsize=10)
    axis.grid(alpha=0.3, axis="y")
    _legend(figure, [axis])
    return figure
