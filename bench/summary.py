"""The goals beside what was measured, and how many cells a peer wins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench import rows
from bench.providers import FLOOR, OURS
from bench.shapes import BOTH, EAGER, GRAPH

__all__ = ["GOALS", "Goal", "goals", "summarise", "table", "tokens_per_second"]

Rows = Sequence[Mapping]
# Llama-3-8B's seven linears: q and o, k and v, gate and up, down.
SEVEN = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}


@dataclass(frozen=True)
class Goal:
    """A bound, and the value of it in rows: None where they do not hold it."""

    text: str
    bound: float
    at_least: bool
    value: Callable[[Rows], float | None]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def layers(measured: Rows, **fields) -> list[Mapping]:
    """The timed rows of layers, forward + backward, with these values in these fields."""
    wanted = {"kind": "layer", "mode": BOTH, "withheld": None, **fields}
    return [
        row for row in measured if all(row.get(name) == value for name, value in wanted.items())
    ]


def _goal_rows(measured: Rows, provider: str, **fields) -> list[Mapping]:
    """The rows that the goals for a GPU speak of, unless fields say otherwise."""
    common = {
        "device": "cuda", "dtype": "bfloat16", "r": 16, "dropout_p": 0.1, "m": 8192,
        "execution": GRAPH, "enable_lora": [True],
    }  # fmt: skip
    return layers(measured, **{**common, **fields, "provider": provider})


def _seven(measured: Rows) -> float | None:
    total = {OURS: 0.0, FLOOR: 0.0}
    for (k, n), count in SEVEN.items():
        for provider in total:
            found = _goal_rows(measured, provider, k=k, n=n)
            if not found:
                return None
            total[provider] += count * found[0]["median_ms"]
    return total[OURS] / total[FLOOR]


def _tax(size: int) -> Callable[[Rows], float | None]:
    return lambda measured: _worst(
        row["over_frozen"] for row in _goal_rows(measured, OURS, k=size, n=size)
    )


def _decode(measured: Rows) -> float | None:
    return _worst(
        row["over_frozen"]
        for m in range(1, 65)
        for row in _goal_rows(measured, OURS, k=4096, n=4096, m=m)
    )


def _saved(measured: Rows) -> float | None:
    """For bfloat16, two bytes an element of x."""
    return _worst(
        row["saved_bytes"] / (2 * row["m"] * row["k"])
        for row in _goal_rows(measured, OURS, k=4096, n=4096)
    )


def _over_peft(measured: Rows) -> float | None:
    return _least_speedup(_goal_rows(measured, "peft", k=4096, n=4096))


def _merged(k: int, n: int) -> Callable[[Rows], float | None]:
    return lambda measured: _least_speedup(
        _goal_rows(measured, "loralib", k=k, n=n, enable_lora=[True, False, True])
    )


def _lost_cells(measured: Rows) -> float | None:
    return float(len(summary_of_losses(measured))) if measured else None


def _cpu(measured: Rows, merged: bool, peers: Sequence[str] = ("loralib", "peft")) -> Rows:
    return [
        row
        for peer in peers
        for row in layers(measured, device="cpu", execution=EAGER, provider=peer)
        if (len(row["enable_lora"]) > 1) == merged
    ]


def _cpu_losses(measured: Rows) -> float | None:
    found = [*_cpu(measured, merged=False), *_cpu(measured, merged=True)]
    return float(len({row["cell"] for row in found if rows.lost(row)})) if found else None


def _cpu_merged(measured: Rows) -> float | None:
    return _least_speedup(_cpu(measured, merged=True, peers=["loralib"]))


def _worst(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def _least_speedup(found: Rows) -> float | None:
    speedups = (1 / row["ours_over_peer"][0] for row in found if row["ours_over_peer"])
    return min(speedups, default=None)


GOALS = (
    Goal("cells in which a peer is faster", 0, False, _lost_cells),
    Goal("Llama-3-8B's seven linears, time over frozen", 1.05, False, _seven),
    Goal("4096x4096, time over frozen", 1.08, False, _tax(4096)),
    Goal("8192x8192, time over frozen", 1.04, False, _tax(8192)),
    Goal("times faster than PEFT at 4096x4096", 1.35, True, _over_peft),
    Goal("MergedLinear, GPT-2 medium QKV, times faster than loralib", 2.5, True,
         _merged(1024, 3072)),
    Goal("MergedLinear, Llama QKV, times faster than loralib", 2.5, True, _merged(4096, 12288)),
    Goal("decode (M <= 64) under a CUDA graph at 4096x4096, time over frozen", 1.10, False,
         _decode),
    Goal("saved for backward beyond x at 4096x4096, over x", 0.01, False, _saved),
    Goal("CPU: cells in which loralib or PEFT is faster, forward + backward", 0, False,
         _cpu_losses),
    Goal("CPU: MergedLinear, times faster than loralib", 2.0, True, _cpu_merged),
)  # fmt: skip


def goals(measured: Rows) -> list[dict]:
    """Each goal with its bound, what was measured and whether it is met; None where nothing was."""
    results = []
    for goal in GOALS:
        value = goal.value(measured)
        results.append(
            {
                "goal": goal.text,
                "bound": ("at least " if goal.at_least else "at most ") + f"{goal.bound:g}",
                "measured": value,
                "met": None if value is None else goal.met(value),
            }
        )
    return results


def summary_of_losses(measured: Rows) -> list[dict]:
    """Each lost cell with the peers that win it."""
    winners: dict[str, list[str]] = {}
    for row in measured:
        if rows.lost(row):
            winners.setdefault(row["cell"], []).append(row["provider"])
    return [{"cell": cell, "faster": names} for cell, names in winners.items()]


def tokens_per_second(row: Mapping) -> float:
    """Of a model's row; m is the number of tokens of its step."""
    return row["m"] / row["median_ms"] * 1e3


def summarise(measured: Rows, files: Sequence[str]) -> dict:
    """What summary.json holds: losses first, then goals, models, what was withheld, the machine."""
    first = measured[0]
    machine = ("commit", "gpu", "driver", "cpu", "threads", "python", "torch", "triton",
               "copy_tb_s", "product_tflop_s", "launch_us")  # fmt: skip
    losses = summary_of_losses(measured)
    return {
        "cells": len({row["cell"] for row in measured}),
        "cells_lost": len(losses),
        "lost": losses,
        "goals": goals(measured),
        "models": [
            {
                "cell": row["cell"],
                "provider": row["provider"],
                "tokens_per_second": tokens_per_second(row),
                "peak_bytes": row["peak_bytes"],
            }
            for row in measured
            if row["kind"] == "model" and not row["withheld"]
        ],
        "withheld": [
            {name: row[name] for name in ("cell", "provider", "withheld")}
            for row in measured
            if row["withheld"]
        ],
        "machine": {name: first.get(name) for name in machine},
        "files": list(files),
    }


def table(results: Iterable[Mapping]) -> str:
    """The goals as a Markdown table."""
    lines = ["| goal | bound | measured |", "|---|---|---|"]
    for result in results:
        value, met = result["measured"], result["met"]
        shown = "not measured" if value is None else f"{value:.3g}{'' if met else ', not met'}"
        lines.append(f"| {result['goal']} | {result['bound']} | {shown} |")
    return "\n".join(lines)
