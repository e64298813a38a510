"""What a run leaves behind: the loss curve, metrics.json, and the numbers on the screen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

__all__ = ["comparison", "directory_bytes", "loss_curve", "per_cent", "write_metrics"]

SMOOTHING = 20  # the line is the mean of a twentieth of the steps


def loss_curve(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws the loss of every step, faint, and its running mean, for each named run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    for name, losses in curves.items():
        window = max(1, len(losses) // SMOOTHING)
        (points,) = axes.plot(range(1, len(losses) + 1), losses, alpha=0.25)
        means = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        axes.plot(
            range(window, len(losses) + 1), means, color=points.get_color(),
            label=f"{name}, mean of {window}",
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def write_metrics(metrics: Mapping, path: Path) -> None:
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def per_cent(share: float) -> str:
    return f"{100 * share:.1f} %"


def comparison(rows: Sequence[Mapping]) -> str:
    """The runs side by side, a line each, and the first one's time as a share of the second's."""
    lines = [f"{'':14}{'before':>8}{'after':>8}{'seconds':>10}{'tokens/s':>10}{'trainable':>12}"]
    lines += [
        f"{row['name']:14}{per_cent(row['accuracy_before']):>8}"
        f"{per_cent(row['accuracy_after']):>8}{row['train_seconds']:>10.1f}"
        f"{row['tokens_per_second']:>10,.0f}{row['trainable_parameters']:>12,}"
        for row in rows
    ]
    first, second = rows
    share = first["train_seconds"] / second["train_seconds"]
    lines.append(f"{first['name']} takes {share:.2f} of the time of {second['name']}")
    return "\n".join(lines)
