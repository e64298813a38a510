"""Pictures of rows: LoRA tax against M, the roofline, saved memory. Only of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import ceilings, roofline
from bench.providers import FLOOR, OURS
from bench.rows import ELEMENT_BYTES
from bench.shapes import BOTH, GRAPH

__all__ = ["draw"]

COLOURS = {FLOOR: "0.4", "loralib": "tab:orange", "peft": "tab:red", "sandwich": "tab:green",
           "unsloth": "tab:olive", "compiled peft": "tab:pink", "compiled formula": "tab:purple",
           OURS: "tab:blue", f"{OURS}[fused]": "tab:cyan", f"{OURS}[sandwich]": "navy",
           f"{OURS}[reference]": "0.7"}  # fmt: skip


def draw(measured: Sequence[Mapping], folder: Path) -> list[Path]:
    """tax.png, roofline.png and memory.png, each where rows hold what it shows."""
    timed = [row for row in measured if row["kind"] == "layer" and not row["withheld"]]
    steps = [row for row in timed if row["mode"] == BOTH]
    linear = [row for row in steps if len(row["enable_lora"]) == 1]
    replayed = [row for row in linear if row["execution"] == GRAPH]
    linear = replayed or linear
    paths = []
    for name, figure, shown in (
        ("tax.png", _tax, linear),
        ("roofline.png", _roofline, [row for row in linear if ceilings.part(row)]),
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
    return list(dict.fromkeys(row["provider"] for row in shown))


def _legend(figure, axes) -> None:
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, fontsize=8)


def _tax(linear: Sequence[Mapping]):
    """A panel per shape, rank and dropout with dropout on where it was measured, a line a peer."""
    dropout = max(row["dropout_p"] for row in linear)
    kept = [row for row in linear if row["dropout_p"] == dropout and row["over_frozen"]]
    panels = list(dict.fromkeys((row["k"], row["n"], row["r"]) for row in kept))
    figure, axes = _figure(len(panels))
    for axis, (k, n, r) in zip(axes, panels, strict=False):
        here = [row for row in kept if (row["k"], row["n"], row["r"]) == (k, n, r)]
        for name in _names(here):
            points = sorted(
                (row["m"], row["over_frozen"]) for row in here if row["provider"] == name
            )
            style = {"color": COLOURS.get(name), "marker": "o", "markersize": 4, "label": name}
            axis.plot(*zip(*points, strict=True), linewidth=2.4 if name == OURS else 1.2, **style)
        tokens = sorted({row["m"] for row in here})
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.minorticks_off()
        axis.set_title(f"{k}x{n}, r = {r}, dropout {dropout:g}", fontsize=9)
        axis.set_xlabel("tokens M", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over frozen layer", fontsize=9)
    figure.suptitle(f"LoRA tax, forward + backward ({_machine(kept[0])})", fontsize=10)
    _legend(figure, axes)
    return figure


def _work(row: Mapping) -> list[tuple[str, float, float, float]]:
    """Label, FLOPs, bytes and seconds of a step at its least traffic, and of its kernels."""
    sizes = (row["m"], row["k"], row["n"], row["r"])
    m, k, n, r = sizes
    element = ELEMENT_BYTES[row["dtype"]]
    flops = 4 * m * k * n + (0 if row["provider"] == FLOOR else 6 * m * r * (k + n))
    traffic = 2 * element * (m * k + k * n + m * n)
    work = [(row["provider"], flops, traffic, row["median_ms"] / 1e3)]
    for name, counted in (row["kernels"] or {}).items():
        known = roofline.kernel_work(name, *sizes, element)
        if known and row["provider"].startswith(OURS):
            work.append((name, *known, counted["us"] * 1e-6))
    return work


def _roofline(linear: Sequence[Mapping]):
    """Achieved FLOP/s against FLOPs a byte, under the two ceilings of the same run."""
    figure, (axis, *_) = _figure(width=7.5)
    part = ceilings.part(linear[0])
    seen = set()
    intensities = []
    for row in linear:
        for index, (label, flops, traffic, seconds) in enumerate(_work(row)):
            intensities.append(flops / traffic)
            style = {"marker": "x" if index else "o", "alpha": 0.7, "linestyle": "none"}
            style["color"] = None if index else COLOURS.get(label)
            axis.plot(
                flops / traffic, flops / seconds / 1e12,
                label=None if label in seen else label, markersize=5, **style,
            )  # fmt: skip
            seen.add(label)
    ends = [min(intensities) / 2, part.flops / part.bandwidth, max(intensities) * 2]
    roof = [min(part.flops, part.bandwidth * intensity) / 1e12 for intensity in sorted(ends)]
    axis.plot(sorted(ends), roof, color="black", linewidth=1, label="ceilings of this run")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte", fontsize=9)
    axis.set_ylabel("TFLOP/s achieved", fontsize=9)
    axis.set_title(f"Roofline, forward + backward ({_machine(linear[0])})", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    _legend(figure, [axis])
    return figure


def _memory(steps: Sequence[Mapping]):
    """Bytes kept for the backward beyond x, over those of x, a group of bars per layer."""
    dropout = max(row["dropout_p"] for row in steps)
    kept = [row for row in steps if row["dropout_p"] == dropout]
    largest = {}
    for row in kept:
        shape = (row["k"], row["n"], row["r"], len(row["enable_lora"]) > 1)
        largest[shape] = max(largest.get(shape, 0), row["m"])
    names = [name for name in _names(kept) if name != FLOOR]
    figure, (axis, *_) = _figure(width=max(6.0, 1.6 * len(largest)))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = {}
        for row in kept:
            shape = (row["k"], row["n"], row["r"], len(row["enable_lora"]) > 1)
            if row["provider"] == name and row["m"] == largest[shape]:
                x_bytes = row["m"] * row["k"] * ELEMENT_BYTES[row["dtype"]]
                bars[list(largest).index(shape) + i * width] = row["saved_bytes"] / x_bytes
        axis.bar(bars.keys(), bars.values(), width, label=name, color=COLOURS.get(name))
    labels = [f"{'merged ' if merged else ''}{k}x{n}\nr = {r}" for k, n, r, merged in largest]
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, fontsize=8)
    axis.set_ylabel("saved beyond x, over x", fontsize=9)
    axis.set_title(f"Saved for backward, dropout {dropout:g} ({_machine(kept[0])})", fontsize=10)
    axis.grid(alpha=0.3, axis="y")
    _legend(figure, [axis])
    return figure
