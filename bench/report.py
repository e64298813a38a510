"""From seconds to rows: quantiles, who is slower, and the table with the losses first."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.shapes import Cell

__all__ = [
    "FLOOR", "OURS", "describe", "losses_first", "lost", "make_rows", "median_interval",
    "quantiles", "table",
]  # fmt: skip

OURS = "lora_kernels"
FLOOR = "frozen"


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


def make_rows(cell: Cell, samples: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """One row per provider. Ratios are medians over rounds of the ratio within a round.

    ``ours_over_peer`` of a peer's row: the ratio and its 99 % interval; None in the other rows.
    """
    rows = {}
    for provider, seconds in samples.items():
        p10, median, p90 = quantiles(seconds)
        rows[provider] = {
            "cell": str(cell),
            "m": cell.m,
            "k": cell.k,
            "n": cell.n,
            "r": cell.r,
            "dropout_p": cell.dropout_p,
            "enable_lora": list(cell.enable_lora),
            "dtype": cell.dtype_name,
            "device": cell.device,
            "mode": cell.mode,
            "provider": provider,
            "rounds": len(seconds),
            "p10_ms": p10 * 1e3,
            "median_ms": median * 1e3,
            "p90_ms": p90 * 1e3,
            "over_frozen": statistics.median(_ratios(seconds, samples[FLOOR])),
            "ours_over_peer": None,
        }
        if provider not in (OURS, FLOOR):
            ratios = _ratios(samples[OURS], seconds)
            rows[provider]["ours_over_peer"] = (
                statistics.median(ratios), *median_interval(ratios)
            )  # fmt: skip
    return rows


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def lost(row: Mapping, speedup: float = 1.0) -> bool:
    """Whether ours is not ``speedup`` times as fast as this row's peer, beyond doubt."""
    ratio = row["ours_over_peer"]
    return ratio is not None and ratio[1] > 1 / speedup


def describe(row: Mapping) -> str:
    """A row's ratio in words."""
    ratio = row["ours_over_peer"]
    return "" if ratio is None else "{:.3f} ({:.3f}-{:.3f})".format(*ratio)


def losses_first(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows of cells that ours loses to some peer, then the others; order kept otherwise."""
    losing = {row["cell"] for row in rows if lost(row)}
    return sorted(rows, key=lambda row: row["cell"] not in losing)


def table(rows: Sequence[Mapping]) -> str:
    """All rows as text, the cells lost to a peer first and marked with an exclamation mark."""
    losses = [row for row in rows if lost(row)]
    cells = {row["cell"] for row in rows}
    width = max(len(cell) for cell in cells)
    lines = [
        f"cells lost to a peer: {len({row['cell'] for row in losses})} of {len(cells)}"
        + "".join(f"\n  {row['cell']}: {row['provider']}" for row in losses),
        "",
        f"{'cell':{width}} {'provider':13} {'median ms':>9} {'p10':>8} {'p90':>8} {'/frozen':>8}  "
        "ours/peer (99 %)",
    ]
    previous = None
    for row in losses_first(rows):
        lines.append(
            f"{row['cell'] if row['cell'] != previous else '':{width}} {row['provider']:13} "
            f"{row['median_ms']:9.3f} {row['p10_ms']:8.3f} {row['p90_ms']:8.3f} "
            f"{row['over_frozen']:8.3f}  {describe(row)}{' !' if lost(row) else ''}".rstrip()
        )
        previous = row["cell"]
    return "\n".join(lines)
