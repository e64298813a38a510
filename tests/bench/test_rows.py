"""Ratios within a round, the verdict on who is slower, the order of rows."""

import pytest

from bench import rows
from bench.cells import Cell
from lora_kernels.tuning import rows as saved

CELL = Cell(m=512, k=8, n=16, r=4, dropout_p=0.1, mode="forward")


def make_row(cell, implementation, ratio=None):
    return {
        "cell": cell, "implementation": implementation, "median_ms": 1.0, "p10_ms": 0.9,
        "p90_ms": 1.2, "over_frozen": 1.1, "ours_over_peer": ratio,
    }  # fmt: skip


def test_make_rows_pairs_the_times_of_a_round():
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


def test_make_rows_takes_this_package_at_another_commit_for_a_peer():
    samples = {name: [1.0] * 20 for name in ("frozen", "lora_kernels@0123456789", "lora_kernels")}
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made["lora_kernels@0123456789"]["ours_over_peer"] == (1.0, 1.0, 1.0)


def test_make_rows_takes_no_algorithm_of_this_package_for_a_peer():
    samples = {name: [1.0] * 20 for name in ("frozen", "lora_kernels[fused]", "lora_kernels")}
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made["lora_kernels[fused]"]["ours_over_peer"] is None
    assert made["lora_kernels[fused]"]["over_frozen"] == 1.0


def test_make_rows_compares_the_algorithms_of_this_package_within_a_round():
    noise = [1.0, 3.0, 2.0, 5.0] * 10
    fused, addmm = "lora_kernels[fused]", "lora_kernels[addmm]"
    samples = {fused: [0.75 * t for t in noise], addmm: noise, "peer": noise}
    made = rows.make_rows(CELL.fields(), samples, samples)
    assert made[fused]["fused_over_addmm"] == (0.75, 0.75, 0.75)
    assert made[addmm]["fused_over_addmm"] is made["peer"]["fused_over_addmm"] is None
    alone = rows.make_rows(CELL.fields(), [fused, addmm], {fused: noise}, {addmm: "wrong: y"})
    assert alone[fused]["fused_over_addmm"] is None


def test_make_rows_says_why_there_are_no_times_and_leaves_the_others_as_they_are():
    samples = {name: [1.0] * 20 for name in ("frozen", "lora_kernels")}
    made = rows.make_rows(
        CELL.fields(), ["frozen", "peer", "lora_kernels"], samples, {"peer": "wrong: y"}
    )
    assert list(made) == ["frozen", "peer", "lora_kernels"]
    assert made["peer"]["skipped"] == "wrong: y"
    assert made["peer"]["median_ms"] is made["peer"]["ours_over_peer"] is None
    assert made["lora_kernels"]["over_frozen"] == 1.0


def test_make_rows_are_loaded_as_they_are_saved(tmp_path):
    samples = {name: [1.0, 2.0] * 10 for name in ("frozen", "loralib", "lora_kernels")}
    written = rows.make_rows(CELL.fields(), samples, samples)
    path = tmp_path / "folder" / "rows.json"
    saved.save(list(written.values()), path)
    for row in saved.load(path):
        expected = written[row["implementation"]]
        ratio = row["ours_over_peer"]
        expected["enable_lora"] = list(expected["enable_lora"])
        assert {**row, "ours_over_peer": ratio and tuple(ratio)} == expected


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
def test_lost_only_if_the_whole_interval_says_so(ratio, speedup, lost):
    assert rows.lost(make_row("c", "peer", ratio), speedup) is lost


def test_losses_name_the_peers_that_win_a_cell():
    measured = [
        make_row("won", "peer", (0.5, 0.4, 0.6)),
        make_row("lost", "peer", (1.5, 1.4, 1.6)),
        make_row("lost", "tied", (1.5, 0.9, 1.6)),
        make_row("lost", "other", (1.5, 1.4, 1.6)),
    ]
    assert rows.losses(measured) == {"lost": ["peer", "other"]}


def test_losses_first_keeps_the_order_within_lost_cells_and_others():
    ordered = [
        make_row("won", "frozen"),
        make_row("won", "peer", (0.5, 0.4, 0.6)),
        make_row("lost", "frozen"),
        make_row("lost", "peer", (0.9, 0.8, 1.1)),
        make_row("lost", "other", (1.5, 1.4, 1.6)),
    ]
    assert rows.losses_first(ordered) == ordered[2:] + ordered[:2]
