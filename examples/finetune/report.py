"""The numbers of a run on the screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["comparison", "directory_bytes", "per_cent"]


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
