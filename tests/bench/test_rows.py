"""Quantiles, ratios within a round, the verdict on who is slower, the order of rows."""

import random

import pytest

from bench import rows
from bench.shapes import Cell

CELL = Cell(m=512, k=8, n=16, r=4, dropout_p=0.1, mode="forward")


def make_row(cell, provider, ratio=None):
    return {
        "cell": cell, "provider": provider, "median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.2,
        "over_frozen": 1.1, "ours_over_peer": ratio,
    }  # fmt: skip


def test_quantiles_are_those_of_a_uniform_grid():
    samples = list(range(101))
    random.Random(0).shuffle(samples)
    assert rows.quantiles(samples) == (10, 50, 90)


def test_median_interval_holds_the_median_and_narrows_with_the_rounds():
    widths = []
    for count in (21, 101, 1001):
        low, high = rows.median_interval(range(count))
        assert low < (count - 1) / 2 < high
        widths.append((high - low) / count)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1


def test_median_interval_misses_the_true_median_in_about_one_of_a_hundred_samples():
    draw = random.Random(0)
    misses = 0
    for _ in range(2000):
        low, high = rows.median_interval(draw.gauss(0, 1) for _ in range(41))
        misses += not low <= 0 <= high
    assert misses <= 40


def test_rows_pair_the_times_of_a_round():
    noise = [1.0, 3.0, 2.0, 5.0] * 10  # five times as large as the difference, but shared
    samples = {
        "frozen": noise,
        "peer": [2 * t for t in noise],
        "lora_kernels": [1.5 * t for t in noise],
    }
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made["peer"]["ours_over_peer"] == (0.75, 0.75, 0.75)
    assert made["lora_kernels"]["over_frozen"] == 1.5
    assert made["frozen"]["ours_over_peer"] is made["lora_kernels"]["ours_over_peer"] is None
    assert made["peer"]["median_ms"] == pytest.approx(5000)
    assert made["peer"]["rounds"] == 40


def test_other_plans_of_this_package_are_no_peers():
    samples = {name: [1.0] * 20 for name in ("frozen", "lora_kernels[fused]", "lora_kernels")}
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made["lora_kernels[fused]"]["ours_over_peer"] is None
    assert made["lora_kernels[fused]"]["over_frozen"] == 1.0


def test_the_plans_of_this_package_are_compared_within_a_round():
    noise = [1.0, 3.0, 2.0, 5.0] * 10
    fused, sandwich = "lora_kernels[fused]", "lora_kernels[sandwich]"
    samples = {fused: [0.75 * t for t in noise], sandwich: noise, "peer": noise}
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made[fused]["fused_over_sandwich"] == (0.75, 0.75, 0.75)
    assert made[sandwich]["fused_over_sandwich"] is made["peer"]["fused_over_sandwich"] is None
    alone = rows.make_rows(CELL.fields(), [fused, sandwich], {fused: noise}, {sandwich: "wrong: y"})
    assert alone[fused]["fused_over_sandwich"] is None


def test_provider_without_times_says_why_and_leaves_the_others_as_they_are():
    samples = {name: [1.0] * 20 for name in ("frozen", "lora_kernels")}
    made = rows.make_rows(
        CELL.fields(), ["frozen", "peer", "lora_kernels"], samples, {"peer": "wrong: y"}
    )
    assert list(made) == ["frozen", "peer", "lora_kernels"]
    assert made["peer"]["withheld"] == "wrong: y"
    assert made["peer"]["median_ms"] is made["peer"]["ours_over_peer"] is None
    assert made["lora_kernels"]["over_frozen"] == 1.0


def test_rows_that_are_saved_are_loaded_again(tmp_path):
    samples = {name: [1.0, 2.0] * 10 for name in ("frozen", "loralib", "lora_kernels")}
    written = rows.make_rows(CELL.fields(), samples, samples)
    path = tmp_path / "folder" / "rows.json"
    rows.save(list(written.values()), path)
    for row in rows.load(path):
        expected = written[row["provider"]]
        ratio = row["ours_over_peer"]
        assert {**row, "ours_over_peer": ratio and tuple(ratio)}.items() >= expected.items()


@pytest.mark.parametrize(
    ("ratio", "speedup", "lost"),
    [
        ((1.2, 1.1, 1.3), 1, True),
        ((1.2, 0.9, 1.3), 1, False),  # one noisy median is no verdict
        ((0.8, 0.7, 0.9), 1, False),
        ((0.8, 0.7, 0.9), 2, True),
        ((0.4, 0.3, 0.6), 2, False),
        (None, 1, False),
    ],
)
def test_a_peer_wins_only_where_the_whole_interval_says_so(ratio, speedup, lost):
    assert rows.lost(make_row("c", "peer", ratio), speedup) is lost


def test_rows_of_lost_cells_come_first_and_keep_their_order():
    ordered = [
        make_row("won", "frozen"),
        make_row("won", "peer", (0.5, 0.4, 0.6)),
        make_row("lost", "frozen"),
        make_row("lost", "peer", (0.9, 0.8, 1.1)),
        make_row("lost", "other", (1.5, 1.4, 1.6)),
    ]
    assert rows.losses_first(ordered) == ordered[2:] + ordered[:2]
