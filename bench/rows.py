"""From seconds to rows: quantiles, ratios within a round, and who is slower beyond doubt."""

import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.providers import FLOOR, FUSED, OURS, SANDWICH

__all__ = [
    "ELEMENT_BYTES", "in_words", "is_ours", "judged", "load", "losses_first", "lost",
    "make_rows", "median_interval", "quantiles", "save",
]  # fmt: skip

# What a row has beside the fields of its cell; the values where nothing was measured.
UNMEASURED = {
    "rounds": 0,
    "p10_ms": None,
    "median_ms": None,
    "p90_ms": None,
    "over_frozen": None,
    "ours_over_peer": None,
    "fused_over_sandwich": None,
    "withheld": None,
    "saved_bytes": None,
    "peak_bytes": None,
    "launches": None,
    "kernels": None,
    "cpu_us": None,
    "state_before": None,
    "state_after": None,
}
# Fields that files written before them lack.
LATER_FIELDS = {
    "kind": "layer", "execution": "eager", "out_splits": None, "gpu": None, "capability": None,
    "copy_tb_s": None, "product_tflop_s": None, "launch_us": None,
}  # fmt: skip

# By the name of a dtype in rows.
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def is_ours(provider: str) -> bool:
    """Whether a provider is this package, under any plan."""
    return provider.partition("[")[0] == OURS


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


def make_rows(
    fields: Mapping,
    providers: Iterable[str],
    samples: Mapping[str, Sequence[float]],
    withheld: Mapping[str, str] | None = None,
) -> dict[str, dict]:
    """One row per provider. Ratios are medians over rounds of the ratio within a round.

    ``ours_over_peer`` of a peer's row: the ratio and its 99 % interval; None in the other rows. So
    ``fused_over_sandwich`` of the row of plan fused. A provider without samples has a row that says
    why in ``withheld``, and no number.
    """
    rows = {}
    for provider in providers:
        row = rows[provider] = {**fields, "provider": provider, **UNMEASURED}
        if provider not in samples:
            row["withheld"] = (withheld or {})[provider]
            continue
        seconds = samples[provider]
        p10, median, p90 = quantiles(seconds)
        row |= {
            "rounds": len(seconds),
            "p10_ms": p10 * 1e3,
            "median_ms": median * 1e3,
            "p90_ms": p90 * 1e3,
        }
        if FLOOR in samples:
            row["over_frozen"] = statistics.median(_ratios(seconds, samples[FLOOR]))
        if OURS in samples and provider != FLOOR and not is_ours(provider):
            row["ours_over_peer"] = judged(samples[OURS], seconds)
        if SANDWICH in samples and provider == FUSED:
            row["fused_over_sandwich"] = judged(seconds, samples[SANDWICH])
    return rows


def judged(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float, float]:
    """The median ratio within a round, and its 99 % interval."""
    ratios = _ratios(numerators, denominators)
    return statistics.median(ratios), *median_interval(ratios)


def in_words(ratio: Sequence[float] | None) -> str:
    """What judged says, as text; empty where nothing was judged."""
    return "" if ratio is None else "{:.3f} ({:.3f}-{:.3f})".format(*ratio)


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def lost(row: Mapping, speedup: float = 1.0) -> bool:
    """Whether ours is not ``speedup`` times as fast as this row's peer, beyond doubt."""
    ratio = row["ours_over_peer"]
    return ratio is not None and ratio[1] > 1 / speedup


def losses_first(rows: Sequence[Mapping]) -> list[Mapping]:
    """The rows of cells that ours loses to some peer, then the others; order kept otherwise."""
    losing = {row["cell"] for row in rows if lost(row)}
    return sorted(rows, key=lambda row: row["cell"] not in losing)


def save(rows: Sequence[Mapping], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def load(path: pathlib.Path) -> list[dict]:
    """The rows of a file, with None for what it did not measure yet."""
    return [{**UNMEASURED, **LATER_FIELDS, **row} for row in json.loads(path.read_text())]
