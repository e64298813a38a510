"""The report of a canned result file is exact, and refuses what it must."""

import json
import shutil
from pathlib import Path

import pytest

from bench import report, rows, summary
from bench.providers import FLOOR, OURS
from bench.shapes import Cell

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MACHINE = {
    "commit": COMMIT, "python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "cpu": "a CPU",
    "threads": 2, "gpu": None, "driver": None, "copy_tb_s": 0.02, "product_tflop_s": 0.1,
    "launch_us": 1.0,
}  # fmt: skip
WON = Cell(m=512, k=1024, n=3072, r=8, dropout_p=0.1, mode="forward+backward",
           enable_lora=(True, False, True))  # fmt: skip
LOST = Cell(m=512, k=768, n=768, r=8, dropout_p=0.1, mode="forward+backward")
CPU_FILES = sorted((Path(report.__file__).parent / "results/cpu").glob("*.json"))
CPU_RESULTS = [path for path in CPU_FILES if path.name != "summary.json"]


def canned(cell, seconds, **changes):
    """Rows of a run in which every round took the same time; saved: 1 MB, of the floor nothing."""
    samples = {name: [value] * 20 for name, value in seconds.items()}
    withheld = {"sandwich": "wrong: sandwich y rms error 1e-3 > 1e-6"}
    made = rows.make_rows(cell.fields(), [*seconds, "sandwich"], samples, withheld)
    for name, row in made.items():
        if not row["withheld"]:
            row["saved_bytes"] = 0 if name == FLOOR else 1_000_000
    return [{**row, **MACHINE, **changes} for row in made.values()]


def canned_rows(**changes):
    won = canned(WON, {FLOOR: 0.010, "loralib": 0.030, OURS: 0.012}, **changes)
    lost = canned(LOST, {FLOOR: 0.010, "loralib": 0.012, "peft": 0.015, OURS: 0.0125}, **changes)
    return won + lost


TERMINAL = """\
cells lost to a peer: 1 of 2
  linear 768x768 m512 r8 p0.1 float32 cpu forward+backward: loralib
not measured:
  sandwich: wrong: sandwich y rms error 1e-3 > 1e-6 (2 cells)
ceilings: copy 0.020 TB/s, product 0.100 TFLOP/s, launch 1.00 us

cell                                                          provider     median ms      p10      p90  /frozen  model saved MB  ours/peer (99 %)
linear 768x768 m512 r8 p0.1 float32 cpu forward+backward      frozen          10.000   10.000   10.000    1.000            0.00
                                                              loralib         12.000   12.000   12.000    1.200   1.14     1.00  1.042 (1.042-1.042) !
                                                              peft            15.000   15.000   15.000    1.500   1.14     1.00  0.833 (0.833-0.833)
                                                              lora_kernels    12.500   12.500   12.500    1.250   1.03     1.00
merged101 1024x3072 m512 r8 p0.1 float32 cpu forward+backward frozen          10.000   10.000   10.000    1.000            0.00
                                                              loralib         30.000   30.000   30.000    3.000            1.00  0.400 (0.400-0.400)
                                                              lora_kernels    12.000   12.000   12.000    1.200            1.00
"""  # noqa: E501

MARKDOWN = """\
| forward + backward, ms (over frozen) | frozen | loralib | peft | sandwich | lora_kernels |
|---|---|---|---|---|---|
| linear 768x768 m512 r8 p0.1 float32 cpu | 10 | **12 (1.20)** | 15 (1.50) | withheld | 12.5 (1.25) |
| merged101 1024x3072 m512 r8 p0.1 float32 cpu | 10 | 30 (3.00) | - | withheld | 12 (1.20) |
"""  # noqa: E501


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "canned.json"
    rows.save(canned_rows(), path)
    return path


def test_terminal_table_is_exact():
    assert report.terminal(canned_rows()) + "\n" == TERMINAL


def test_report_of_a_canned_file_is_exact(result_file, capsys):
    assert report.main([str(result_file)]) == 0
    folder = result_file.parent
    assert (folder / "table.md").read_text() == MARKDOWN
    made = json.loads((folder / "summary.json").read_text())
    assert list(made)[:3] == ["cells", "cells_lost", "lost"]
    assert (made["cells"], made["cells_lost"]) == (2, 1)
    assert made["lost"] == [{"cell": str(LOST), "faster": ["loralib"]}]
    measured = {goal["goal"]: (goal["measured"], goal["met"]) for goal in made["goals"]}
    assert measured["cells in which a peer is faster"] == (1.0, False)
    merged, met = measured["CPU: MergedLinear, times faster than loralib"]
    assert (merged, met) == (pytest.approx(2.5), True)
    assert measured["4096x4096, time over frozen"] == (None, None)
    assert made["machine"]["commit"] == COMMIT
    assert [entry["provider"] for entry in made["withheld"]] == ["sandwich"] * 2
    for picture in ("tax.png", "roofline.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert output.startswith("cells lost to a peer: 1 of 2\n")
    assert "| 4096x4096, time over frozen | at most 1.08 | not measured |" in output
    assert "| cells in which a peer is faster | at most 0 | 1, not met |" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": COMMIT + "-dirty"}, "results are kept of committed code only"),
        ({"commit": "another"}, "rows of one commit are needed"),
    ],
)
def test_dirty_and_mixed_rows_are_refused_and_nothing_is_written(
    tmp_path, capsys, changes, message
):
    path = tmp_path / "canned.json"
    mixed = canned_rows() if changes["commit"] == "another" else []
    rows.save(mixed + canned_rows(**changes), path)
    assert report.main([str(path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def goal_rows(sizes, seconds, **changes):
    fields = {"m": 8192, "r": 16, "dropout_p": 0.1, "device": "cuda", "execution": "graph"}
    made = []
    for k, n in sizes:
        cell = Cell(mode="forward+backward", k=k, n=n, **{**fields, **changes})
        made += canned(cell, seconds, dtype="bfloat16", gpu="a GPU")
    return made


def test_goals_of_a_gpu_are_found_among_its_rows():
    times = {FLOOR: 0.100, "peft": 0.150, OURS: 0.104}
    measured = goal_rows([*summary.SEVEN, (8192, 8192)], times)
    measured += goal_rows([(4096, 4096)], {FLOOR: 1.0, OURS: 1.2}, m=16)
    measured += goal_rows([(4096, 4096)], {FLOOR: 1.0, OURS: 9.0}, execution="eager")
    values = {goal["goal"]: goal["measured"] for goal in summary.goals(measured)}
    assert values["Llama-3-8B's seven linears, time over frozen"] == pytest.approx(1.04)
    assert values["8192x8192, time over frozen"] == pytest.approx(1.04)
    assert values["times faster than PEFT at 4096x4096"] == pytest.approx(1.5 / 1.04)
    assert values[
        "decode (M <= 64) under a CUDA graph at 4096x4096, time over frozen"
    ] == pytest.approx(1.2)
    assert values["saved for backward beyond x at 4096x4096, over x"] == pytest.approx(
        1_000_000 / (2 * 8192 * 4096)
    )
    assert values["CPU: MergedLinear, times faster than loralib"] is None


def test_seven_linears_are_not_measured_while_one_is_missing():
    measured = goal_rows(list(summary.SEVEN)[:3], {FLOOR: 0.1, OURS: 0.1})
    assert summary.goals(measured)[1]["measured"] is None


def test_prediction_is_that_of_the_scheme_on_the_machine_of_the_row():
    by_name = {row["provider"]: row for row in canned_rows() if row["cell"] == str(LOST)}
    assert report.predicted(by_name[FLOOR]) is None
    assert 1.0 < report.predicted(by_name[OURS]) < report.predicted(by_name["peft"])
    assert report.predicted({**by_name["peft"], "dropout_p": 0.0}) is None
    assert report.predicted({**by_name[OURS], "copy_tb_s": None}) is None
    assert report.predicted({**by_name[OURS], "mode": "forward"}) is None


def test_models_are_told_in_tokens_per_second():
    row = {**canned_rows()[0], "kind": "model", "model": "m", "m": 256, "peak_bytes": 2_000_000}
    assert summary.tokens_per_second(row) == pytest.approx(25_600)
    assert report.terminal([row]).endswith(", frozen: 25600 tokens/s, peak 2.00 MB")


@pytest.mark.parametrize("path", CPU_RESULTS, ids=lambda path: path.name)
def test_results_in_the_repository_can_be_read(path, tmp_path):
    copied = shutil.copy(path, tmp_path)
    assert report.main([str(copied)]) == 0
    made = json.loads((tmp_path / "summary.json").read_text())
    assert made["cells"] >= 12
    assert (tmp_path / "tax.png").exists()
