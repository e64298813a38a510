"""The report of a canned result file is exact, and refuses what it must."""

import json
import shutil
from pathlib import Path

import pytest

from bench import report, rows
from bench.cells import Cell
from bench.implementations import FLOOR
from lora_kernels.tuning.rows import OURS, save

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
    skipped = {"addmm": "wrong: addmm y rms error 1e-3 > 1e-6"}
    made = rows.make_rows(cell.fields(), [*seconds, "addmm"], samples, skipped)
    for name, row in made.items():
        if not row["skipped"]:
            row["saved_bytes"] = 0 if name == FLOOR else 1_000_000
    return [{**row, **MACHINE, **changes} for row in made.values()]


def canned_rows(**changes):
    won = canned(WON, {FLOOR: 0.010, "loralib": 0.030, OURS: 0.012}, **changes)
    lost = canned(LOST, {FLOOR: 0.010, "loralib": 0.012, "peft": 0.015, OURS: 0.0125}, **changes)
    return won + lost


TERMINAL = """\
cells: 1 won, 1 lost, 0 undecided, 0 without a peer
lost to:
  linear 768x768 m512 r8 p0.1 float32 cpu forward+backward: loralib
skipped:
  addmm: wrong: addmm y rms error 1e-3 > 1e-6 (2 cells)
ceilings: copy 0.020 TB/s, product 0.100 TFLOP/s, launch 1.00 us

  implementation median ms      p10      p90  /frozen saved MB  ours/peer (99 %)
linear 768x768 m512 r8 p0.1 float32 cpu forward+backward
  frozen            10.000   10.000   10.000    1.000     0.00
  loralib           12.000   12.000   12.000    1.200     1.00  1.042 (1.042-1.042) !
  peft              15.000   15.000   15.000    1.500     1.00  0.833 (0.833-0.833)
  lora_kernels      12.500   12.500   12.500    1.250     1.00
merged101 1024x3072 m512 r8 p0.1 float32 cpu forward+backward
  frozen            10.000   10.000   10.000    1.000     0.00
  loralib           30.000   30.000   30.000    3.000     1.00  0.400 (0.400-0.400)
  lora_kernels      12.000   12.000   12.000    1.200     1.00
"""

MARKDOWN = """\
| forward + backward, ms (over frozen) | frozen | loralib | peft | addmm | lora_kernels |
|---|---|---|---|---|---|
| linear 768x768 m512 r8 p0.1 float32 cpu | 10 | **12 (1.20)** | 15 (1.50) | skipped | 12.5 (1.25) |
| merged101 1024x3072 m512 r8 p0.1 float32 cpu | 10 | 30 (3.00) | - | skipped | 12 (1.20) |
"""


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "canned.json"
    save(canned_rows(), path)
    return path


def test_terminal_is_exact():
    assert report.terminal(canned_rows()) + "\n" == TERMINAL


def test_main_writes_of_a_canned_file_exactly(result_file, capsys):
    assert report.main([str(result_file)]) == 0
    folder = result_file.parent
    assert (folder / "table.md").read_text() == MARKDOWN
    made = json.loads((folder / "summary.json").read_text())
    assert list(made)[:3] == ["cells", "cells_lost", "lost"]
    assert (made["cells"], made["cells_lost"]) == (2, 1)
    assert made["lost"] == [{"cell": str(LOST), "faster": ["loralib"]}]
    assert made["machine"]["commit"] == COMMIT
    assert [entry["implementation"] for entry in made["skipped"]] == ["addmm"] * 2
    for picture in ("tax.png", "roofline.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert output.startswith(TERMINAL)
    assert str(folder / "table.md") in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": COMMIT + "-dirty"}, "results are kept of committed code only"),
        ({"commit": "another"}, "rows of one commit are needed"),
    ],
)
def test_main_refuses_dirty_and_mixed_rows_and_writes_nothing(tmp_path, capsys, changes, message):
    path = tmp_path / "canned.json"
    mixed = canned_rows() if changes["commit"] == "another" else []
    save(mixed + canned_rows(**changes), path)
    assert report.main([str(path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_terminal_shows_what_the_kernels_reach_of_the_ceilings():
    """The gradient of a in 100 us: 2·m·k·r FLOPs at 0.1 TFLOP/s take 63 us."""
    made = canned(LOST, {FLOOR: 0.010, OURS: 0.012})
    made[1]["kernels"] = {"_grad_a_kernel": {"launches": 1, "us": 100.0}}
    assert report.terminal(made).endswith(
        f"\n\nkernels, of the ceiling of this run:\n  {LOST}, {OURS}: _grad_a_kernel 100.0 us, 81%"
    )


def test_terminal_tells_tokens_per_second_of_models():
    row = {**canned_rows()[0], "kind": "model", "model": "m", "m": 256, "peak_bytes": 2_000_000}
    assert report.tokens_per_second(row) == pytest.approx(25_600)
    assert report.terminal([row]).endswith(", frozen: 25600 tokens/s, peak 2.00 MB")


def test_a_busy_machine_is_told_loudly():
    made = canned_rows()
    for row in made:
        if row["implementation"] == FLOOR:
            row["p90_ms"] *= 3
    first = report.terminal(made).splitlines()[0]
    assert first.startswith(
        "!!! THE MACHINE WAS BUSY: steps of the frozen layer differ by a factor of 3"
    )
    assert "BUSY" not in report.terminal(canned_rows())


def test_the_table_fits_100_columns():
    long = {"lora_kernels[reference]": 0.02, "compiled formula": 0.02, "peft": 10.0}
    text = report.terminal(canned(LOST, {FLOOR: 0.010, **long, OURS: 0.0125}))
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ([(0.8, 0.7, 0.9)], "won"), ([(0.8, 0.7, 0.9), (1.0, 0.9, 1.1)], "undecided"),
        ([(0.8, 0.7, 0.9), (1.2, 1.1, 1.3)], "lost"), ([], "without a peer"),
    ],
)  # fmt: skip
def test_outcomes_of_a_cell(ratios, outcome):
    made = [{"cell": "a", "ours_over_peer": ratio} for ratio in [None, *ratios]]
    assert rows.outcomes(made) == {"a": outcome}


@pytest.mark.parametrize("path", CPU_RESULTS, ids=lambda path: path.name)
def test_main_makes_of_the_results_in_the_repository_the_summary_beside_them(path, tmp_path):
    copied = shutil.copy(path, tmp_path)
    assert report.main([str(copied)]) == 0
    assert (tmp_path / "summary.json").read_text() == (path.parent / "summary.json").read_text()
    assert (tmp_path / "tax.png").exists()
