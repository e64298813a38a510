"""The picture of a training: its loss over the steps and, below, what was measured on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Points", "curves", "means"]

SMOOTHING = 20  # a line is the mean of a twentieth of the steps

Points = Sequence[tuple[float, float]]  # step, value


def curves(
    path: Path,
    title: str,
    losses: Mapping[str, Points],
    unit: str,
    scores: Mapping[str, Points] | None = None,
    measure: str = "",
) -> None:
    """Draws the losses of named runs, faint, and their running means; scores have their own panel.

    unit: of the loss. measure: what scores are, with their unit.
    """
    panels = 2 if scores and any(scores.values()) else 1
    figure = Figure(figsize=(7, 3 + 2 * panels), layout="constrained")
    top, *below = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title)
    top.set_ylabel(f"training loss\n({unit})")
    window = max(1, max(map(len, losses.values()), default=1) // SMOOTHING)
    for name, points in losses.items():
        (faint,) = top.plot(*zip(*points, strict=True), alpha=0.25)
        top.plot(
            *zip(*means(points, window), strict=True), color=faint.get_color(), marker=".",
            markevery=[-1], label=name if window == 1 else f"{name}, mean of {window} points",
        )  # fmt: skip
    for axes in below:
        axes.set_ylabel(measure)
        for name, points in scores.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    for axes in (top, *below):
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)  # numbers as they are
    last = (below or [top])[-1]
    last.set_xlabel("step of the optimizer")
    last.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def means(points: Points, window: int) -> Points:
    """The mean of each value and the window - 1 before it, from the first whole window on."""
    return [
        (points[i - 1][0], sum(value for _, value in points[i - window : i]) / window)
        for i in range(min(window, len(points)), len(points) + 1)
    ]
