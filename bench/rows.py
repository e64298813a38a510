"""From seconds to the rows of a cell, and which cells a peer wins."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.implementations import FLOOR
from lora_kernels.tuning.rows import ADDMM, FUSED, OURS, paired_ratio, quantiles

__all__ = ["OUTCOMES", "is_ours", "losses", "losses_first", "lost", "make_rows", "outcomes"]

OUTCOMES = ("won", "lost", "undecided", "without a peer")  # of a cell, for this package

# What a row has beside the fields of its cell; the values if nothing was measured.
UNMEASURED = {"rounds": 0} | dict.fromkeys((
    "p10_ms", "median_ms", "p90_ms", "over_frozen", "ours_over_peer", "fused_over_addmm", "skipped",
    "saved_bytes", "peak_bytes", "launches", "kernels", "cpu_us", "state_before", "state_after",
))  # fmt: skip


def is_ours(implementation: str) -> bool:
    """Whether an implementation is this package, under any algorithm."""
    return implementation.partition("[")[0] == OURS


def make_rows(
    fields: Mapping,
    implementations: Iterable[str],
    samples: Mapping[str, Sequence[float]],
    skipped: Mapping[str, str] | None = None,
) -> dict[str, dict]:
    """One row per implementation. Ratios are medians over rounds of the ratio within a round.

    ``ours_over_peer`` of a peer's row: the ratio and its 99 % interval; None in the other rows. So
    ``fused_over_addmm`` of the row of algorithm fused. An implementation without samples has a row
    that says why in ``skipped``, and no number.
    """
    rows = {}
    for name in implementations:
        row = rows[name] = {**fields, "implementation": name, **UNMEASURED}
        if name not in samples:
            row["skipped"] = (skipped or {})[name]
            continue
        seconds = samples[name]
        for field, value in zip(("p10_ms", "median_ms", "p90_ms"), quantiles(seconds), strict=True):
            row[field] = value * 1e3
        row["rounds"] = len(seconds)
        if FLOOR in samples:
            pairs = zip(seconds, samples[FLOOR], strict=True)
            row["over_frozen"] = statistics.median(time / floor for time, floor in pairs)
        if OURS in samples and name != FLOOR and not is_ours(name):
            row["ours_over_peer"] = paired_ratio(samples[OURS], seconds)
        if ADDMM in samples and name == FUSED:
            row["fused_over_addmm"] = paired_ratio(seconds, samples[ADDMM])
    return rows


def lost(row: Mapping, speedup: float = 1.0) -> bool:
    """Whether ours is not ``speedup`` times as fast as this row's peer, beyond doubt."""
    ratio = row["ours_over_peer"]
    return ratio is not None and ratio[1] > 1 / speedup


def losses(measured: Iterable[Mapping]) -> dict[str, list[str]]:
    """Each lost cell with the peers that win it."""
    winners: dict[str, list[str]] = {}
    for row in measured:
        if lost(row):
            winners.setdefault(row["cell"], []).append(row["implementation"])
    return winners


def outcomes(measured: Iterable[Mapping]) -> dict[str, str]:
    """Of each cell, one of OUTCOMES: won against every peer, lost to one, or neither beyond doubt.

    Against a peer it is beyond doubt if the 99 % interval of the ratio lies on one side of 1.
    """
    ratios: dict[str, list[Sequence[float]]] = {}
    for row in measured:
        of_cell = ratios.setdefault(row["cell"], [])
        if row["ours_over_peer"] is not None:
            of_cell.append(row["ours_over_peer"])
    found = {}
    for cell, of_cell in ratios.items():
        if not of_cell:
            found[cell] = "without a peer"
        elif any(low > 1 for _, low, _ in of_cell):
            found[cell] = "lost"
        else:
            found[cell] = "won" if all(high < 1 for *_, high in of_cell) else "undecided"
    return found


def losses_first(measured: Sequence[Mapping]) -> list[Mapping]:
    """The rows of cells that ours loses to some peer, then the others; order kept otherwise."""
    losing = losses(measured)
    return sorted(measured, key=lambda row: row["cell"] not in losing)
