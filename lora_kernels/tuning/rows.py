"""Rows of results: the words in them, what seconds say of each other, and their files."""

import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "ADDMM", "BACKWARD", "BOTH", "EAGER", "FORWARD", "FUSED", "GRAPH", "OURS", "Ratio", "faster",
    "load", "median_interval", "paired_ratio", "quantiles", "ratio_text", "save",
]  # fmt: skip

OURS = "lora_kernels"
FUSED, ADDMM = f"{OURS}[fused]", f"{OURS}[addmm]"  # this package under one of its algorithms
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
EAGER, GRAPH = "eager", "graph"  # a step as Python issues it, or as a CUDA graph replays it

# A ratio of two times, and the bounds of its 99 % interval.
Ratio = tuple[float, float, float]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 10th percentile, the median and the 90th percentile."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return deciles[0], deciles[4], deciles[8]


def median_interval(values: Iterable[float]) -> tuple[float, float]:
    """Bounds that the true median lies within, at 99 % confidence, by the sign test.

    They are order statistics of the values: nothing is assumed of the noise but independence from
    round to round.
    """
    ordered = sorted(values)
    half, reach = len(ordered) / 2, 2.576 * math.sqrt(len(ordered)) / 2
    low = max(math.floor(half - reach) - 1, 0)
    high = min(math.ceil(half + reach), len(ordered) - 1)
    return ordered[low], ordered[high]


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The median ratio within a round, and its 99 % interval."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), *median_interval(ratios)


def faster(ratio: Sequence[float] | None) -> bool:
    """Whether the numerator is faster beyond doubt; not if nothing was compared."""
    return ratio is not None and ratio[2] < 1


def ratio_text(ratio: Sequence[float] | None) -> str:
    """A ratio with its interval as text; empty if nothing was compared."""
    return "" if ratio is None else "{:.3f} ({:.3f}-{:.3f})".format(*ratio)


def save(rows: Sequence[Mapping], path: pathlib.Path) -> None:
    """Writes rows to a file of JSON, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def load(path: pathlib.Path) -> list[dict]:
    """The rows of a file. Raises: ValueError, naming the file, if it holds none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON: {error}") from error
    if not (isinstance(found, list) and found and all(isinstance(row, dict) for row in found)):
        raise ValueError(f"{path}: holds no rows of pytest bench/ --bench-results FILE")
    return found
