"""Tuning: what is tried, what is withheld, what is timed, and what is told of it."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import candidates, timing, trial, tune
from bench.candidates import LAUNCHERS, source
from bench.shapes import FORWARD, Cell
from lora_kernels.kernels.launch import Gemm, Skinny

REPOSITORY = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELL = Cell(80, 48, 40, 3, 0.25, FORWARD, dtype=torch.float16, device=DEVICE)
FEW = dataclasses.replace(CELL, m=13)  # what few_rows takes
SKINNY = [name for name in LAUNCHERS if LAUNCHERS[name].dots]
LARGE = [name for name in LAUNCHERS if not LAUNCHERS[name].dots and name != "few_rows"]


def cell_for(name):
    return FEW if name == "few_rows" else CELL


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr(timing, "WARMUP_ROUNDS", 0)


@pytest.mark.parametrize("name", SKINNY)
def test_grid_of_a_skinny_kernel_has_no_duplicates_and_keeps_its_limits(name):
    grid = candidates.grid(name, CELL, tma=True)
    assert 20 <= len(set(grid)) == len(grid) <= 120
    for config in grid:
        assert config.BLOCK_ROWS in (32, 64, 128, 256)
        assert config.BLOCK_COLS in (32, 64, 128, 256)
        assert 2048 <= config.BLOCK_ROWS * config.BLOCK_COLS <= 16384
    assert {config.num_warps for config in grid} == {4, 8}
    cut = not name.startswith("fill")
    assert {config.num_stages for config in grid} == ({2, 3, 4} if cut else {1})
    assert {config.waves for config in grid} == ({1, 2, 4} if cut else {2})


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [16, 64, 65, 8192])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_grid_of_a_large_product_has_no_duplicates_and_keeps_its_limits(name, tma, m, dropout_p):
    cell = dataclasses.replace(CELL, m=m, dropout_p=dropout_p)
    grid = candidates.grid(name, cell, tma)
    assert 20 <= len(set(grid)) == len(grid) <= 70
    assert {config.tma for config in grid} == ({True, False} if tma else {False})
    masked = name == "dx" and dropout_p > 0 and m > 64
    assert {config.pieces for config in grid} == ({1, 2, 4} if masked else {1})
    assert {config.GROUP_M for config in grid} == ({8} if m <= 64 else {4, 8, 16})
    assert {config.num_stages for config in grid} == {3, 4, 5}
    assert max(config.BLOCK_M for config in grid) == (64 if m <= 64 else 256)
    for config in grid:
        assert config.num_warps in (4, 8)
        assert config.BLOCK_N // config.pieces >= 16


@pytest.mark.parametrize(
    ("m", "dtype", "rows"),
    [
        (1, torch.float16, 16), (16, torch.float16, 16), (17, torch.float16, 64),
        (64, torch.float16, 64), (1, torch.float32, 64),
    ],
    ids=str,
)  # fmt: skip
def test_grid_of_few_rows_has_no_duplicates_and_serves_all_that_its_entry_does(m, dtype, rows):
    grid = candidates.grid("few_rows", dataclasses.replace(CELL, m=m, dtype=dtype), tma=True)
    assert 20 <= len(set(grid)) == len(grid) <= 70
    assert {config.BLOCK_M for config in grid} == {rows}
    assert {config.BLOCK_N for config in grid} == {16, 32, 64}
    assert {config.num_warps for config in grid} == {4, 8}
    assert {config.num_stages for config in grid} == {3, 4, 5}


def test_few_rows_is_tuned_where_it_is_what_runs():
    cells = [dataclasses.replace(CELL, m=m, dropout_p=p) for m in (16, 17, 65) for p in (0.0, 0.1)]
    tuned = [(case.cell.m, case.cell.dropout_p) for case in tune.cases(["few_rows"], cells, 1)]
    assert tuned == [(16, 0.0), (16, 0.1), (17, 0.0)]


@pytest.mark.parametrize(
    ("m", "entry", "tma"), [(16, "few_rows", {False}), (80, "tma", {True, False})]
)
@pytest.mark.parametrize("name", LARGE)
def test_descriptors_are_tried_where_the_entry_is_for_matrices_that_they_fit(
    name, m, entry, tma, monkeypatch
):
    table = dict.fromkeys(("few_rows", "pointer", "tma"), Gemm(16, 16, 16, 4, 1))
    target = candidates.target_of(torch.device(DEVICE))
    monkeypatch.setitem(LAUNCHERS[name].module.CONFIGS, target, table)
    (case,) = tune.cases([name], [dataclasses.replace(CELL, m=m)], limit=None)
    assert case.entry == entry
    assert {config.tma for config in case.others} == tma


def test_thinning_is_even_and_repeats_nothing():
    assert candidates.thin(range(10), 5) == [0, 2, 4, 6, 8]
    assert candidates.thin(range(3), 5) == candidates.thin(range(3), None) == [0, 1, 2]
    for limit in range(1, 12):
        assert len(set(candidates.thin(range(11), limit))) == min(limit, 11)


@pytest.mark.parametrize("m", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_counts_as_the_tables_own_is_what_the_launcher_takes(name, dtype, m, monkeypatch):
    launcher = LAUNCHERS[name]
    shapes = [(16, 32), (32, 16), (32, 32), (64, 32), (32, 64), (64, 64)]
    if launcher.dots:
        entries = {e: Skinny(*shapes[i], 4, 1) for i, e in enumerate(("narrow", "wide"))}
    else:
        names = ("float32", "few_rows", "pointer", "tma", "up_to_16", "up_to_64")
        entries = {e: Gemm(*shapes[i], 16, 4, 1) for i, e in enumerate(names)}
    o = candidates.operands(dataclasses.replace(CELL, m=m, dtype=dtype))
    target = candidates.target_of(o.x.device)
    monkeypatch.setitem(launcher.module.CONFIGS, target, entries)
    launched = []
    monkeypatch.setattr(launcher.module, "launch", lambda *args, **meta: launched.append(meta))
    candidates.run(name, o, None)

    entry, config = candidates.table_entry(name, o)
    assert entries[entry] == config
    blocks = [v for what, v in launched[0].items() if what in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert blocks == [v for what, v in vars(config).items() if what.startswith("BLOCK_")]


def test_cells_that_a_launcher_does_not_tell_apart_are_one_case():
    cells = [dataclasses.replace(FEW, n=n, dropout_p=p) for n in (40, 56) for p in (0.0, 0.25)]
    counts = dict.fromkeys(LAUNCHERS, 0)
    for case in tune.cases(list(LAUNCHERS), cells, limit=1):
        counts[case.name] += 1
    assert counts == {
        "down": 2, "forward": 2, "few_rows": 4, "dy_pass": 2, "dx": 4, "da": 2, "fill_y": 2,
        "fill_dx": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_tables_own_is_no_candidate_besides(name, monkeypatch):
    grid = candidates.grid(name, cell_for(name), tma=True)
    entries = ("narrow", "wide", "pointer", "tma", "float32", "up_to_16")
    table = {entry: grid[5] for entry in entries}
    target = candidates.target_of(torch.device(DEVICE))
    monkeypatch.setitem(LAUNCHERS[name].module.CONFIGS, target, table)
    (case,) = tune.cases([name], [cell_for(name)], limit=None)
    assert case.table == grid[5]
    assert set(grid) - {grid[5]} >= set(case.others)
    assert case.table not in case.others
    assert len(case.others) > 10


def test_pieces_make_no_difference_where_nothing_is_masked():
    in_pieces = Gemm(128, 256, 64, 8, 3, pieces=4)
    assert candidates.as_run("dx", CELL, in_pieces) == in_pieces
    unmasked = dataclasses.replace(CELL, dropout_p=0.0)
    assert candidates.as_run("dx", unmasked, in_pieces) == Gemm(128, 256, 64, 8, 3)


@pytest.mark.parametrize(("m", "dtype"), [(16, torch.float32), (80, torch.float16)], ids=str)
def test_every_launcher_is_right_and_timed_by_its_table_and_by_candidates(m, dtype, few_rounds):
    cell = dataclasses.replace(CELL, m=m, dtype=dtype)
    for case in tune.cases(list(LAUNCHERS), [cell], limit=1):
        configs = (case.table, *case.others)
        measured, samples = tune.measure(case, configs, {}, seconds=0)
        assert [row["reason"] for row in measured] == [None, None]
        assert samples.keys() == set(configs)
        assert all(row["gb_s"] > 0 and row["tflop_s"] > 0 for row in measured)


FAILING, WRONG, SLOW, RIGHT = (Skinny(16, cols, 4, 2) for cols in (16, 32, 64, 128))


@pytest.fixture
def faulty(monkeypatch, few_rounds):
    """A case of down whose candidates have faults, and the configurations that were launched."""
    (case,) = tune.cases(["down"], [CELL], limit=1)
    case = dataclasses.replace(case, others=(SLOW, FAILING, WRONG, RIGHT))
    launched, launcher = [], LAUNCHERS["down"]

    def call(o, config):
        launched.append(config)
        if config == FAILING:
            raise RuntimeError("out of resource:\n shared memory")
        for _ in range(6 if config == SLOW else 1):
            (h,) = launcher.call(o, config)
        return (h * 1.05 if config == WRONG else h,)

    monkeypatch.setitem(candidates.LAUNCHERS, "down", dataclasses.replace(launcher, call=call))
    return case, launched


def test_failing_and_wrong_candidates_are_withheld_and_a_slow_one_ranks_behind(faulty):
    case, _ = faulty
    configs = (case.table, *case.others)
    measured, samples = tune.measure(case, configs, {}, seconds=0)
    by_config = dict(zip(configs, measured, strict=True))
    assert by_config[FAILING]["reason"] == "RuntimeError: out of resource: shared memory"
    assert by_config[WRONG]["reason"].startswith("wrong: result rms error")
    assert samples.keys() == {case.table, SLOW, RIGHT}
    assert by_config[SLOW]["over_table"][0] > 2 * by_config[RIGHT]["over_table"][0]
    for config in (FAILING, WRONG):
        assert by_config[config]["median_ms"] is by_config[config]["over_table"] is None

    lines = tune.report(case, measured, configs).splitlines()
    assert [line.rpartition("  ")[2] for line in lines[1:4]] == [
        source(case.table), source(RIGHT), source(SLOW),
    ]  # fmt: skip
    assert f"no time: {source(FAILING)}: RuntimeError" in lines[4]
    assert f"no time: {source(WRONG)}: wrong" in lines[5]
    assert "3 of 5 timed" in lines[0]


def test_what_is_known_to_fail_is_not_launched_again(faulty):
    case, launched = faulty
    measured, _ = tune.measure(case, (case.table, SLOW), {SLOW: "it died"}, seconds=0)
    assert [row["reason"] for row in measured] == [None, "it died"]
    assert set(launched) == {None}  # the launcher asks its table


def attempted(what: str) -> None:
    if what == "raise":
        raise ValueError("two\nlines")
    if what == "die":
        os._exit(3)


def test_a_process_that_dies_loses_its_own_task_alone():
    died = "its process died, exit code 3"
    failures = trial.attempt(attempted, ["die", "die", "fine", "raise"], jobs=2)
    assert failures == [died, died, None, "ValueError: two lines"]


def test_a_process_whose_cuda_is_broken_is_of_no_more_use(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    answers, tasks = [], iter(["fine", "raise"])
    pipe = types.SimpleNamespace(recv=lambda: next(tasks), send=answers.append)
    with pytest.raises(StopIteration):
        trial._serve(pipe, attempted)
    assert answers == [(None, True), ("ValueError: two lines", False)]


def test_a_task_without_end_is_given_up():
    assert trial.attempt(attempted, ["fine"], jobs=2, timeout=0.0) == ["no end within 0 s"]


def test_one_job_is_this_process():
    assert trial.attempt(attempted, ["raise", "fine"], jobs=1) == ["ValueError: two lines", None]


ALL_CONFIGS = {
    config
    for name, launcher in LAUNCHERS.items()
    for config in (
        *candidates.grid(name, cell_for(name), tma=True),
        *(entry for table in launcher.module.CONFIGS.values() for entry in table.values()),
    )
}


def test_line_to_paste_is_python_that_says_the_configuration():
    table = Skinny(1, 1, 1, 1)
    for config in ALL_CONFIGS:
        verdict = tune.Verdict("dx.py", "tma", table, config, (0.5, 0.4, 0.6), (0.5,))
        assert eval("{" + verdict.pasted + "}", {"Gemm": Gemm, "Skinny": Skinny}) == {"tma": config}
        assert verdict.pasted in str(verdict)


def verdict_of(monkeypatch, screened, timed, name="down", cells=(CELL, CELL)):
    """What confirm makes of seconds in the first run, and in the second one."""
    table = Gemm(64, 64, 64, 4, 3, pieces=2) if name == "dx" else RIGHT
    group = [tune.Case(name, cell, "narrow", table, ()) for cell in cells]
    again = iter(timed)

    def measure(case, configs, failed, seconds, stage):
        times = next(again)
        assert set(times) <= set(configs)
        return [{"stage": stage}] * len(configs), times

    monkeypatch.setattr(tune, "measure", measure)
    return tune.confirm(group, screened, seconds=0)


def test_best_over_the_cells_is_timed_again_and_pasted_where_it_is_faster(monkeypatch):
    screened = [{RIGHT: [4.0], SLOW: [1.0], WRONG: [3.0]}, {RIGHT: [4.0], SLOW: [20.0], WRONG: [3]}]
    timed = [{RIGHT: [4.0] * 30, WRONG: [2.0] * 30}, {RIGHT: [12.0] * 30, WRONG: [12.0] * 30}]
    measured, verdict = verdict_of(monkeypatch, screened, timed)
    assert verdict.best == WRONG
    assert verdict.ratio == pytest.approx((14 / 16,) * 3)
    assert verdict.by_cell == (0.5, 1.0)
    assert verdict.faster
    assert str(verdict).endswith(f'"narrow": {source(WRONG)},')
    assert [row["stage"] for row in measured] == ["confirm"] * 4


def test_a_configuration_that_was_fast_by_chance_is_not_pasted(monkeypatch):
    screened = [{RIGHT: [4.0], SLOW: [3.0]}] * 2
    timed = [{RIGHT: [4.0, 5.0] * 10, SLOW: [5.0, 4.0] * 10}] * 2
    _, verdict = verdict_of(monkeypatch, screened, timed)
    assert verdict.best == SLOW
    assert not verdict.faster
    assert verdict.pasted not in str(verdict)
    assert f"keep {source(RIGHT)}" in str(verdict)


def test_nothing_is_timed_again_where_the_table_is_best_or_nothing_ran_everywhere(monkeypatch):
    measured, verdict = verdict_of(monkeypatch, [{RIGHT: [1.0], SLOW: [2.0]}] * 2, [])
    assert measured == []
    assert not verdict.faster
    assert "nothing looked faster" in str(verdict)
    assert verdict_of(monkeypatch, [{RIGHT: [1.0]}, {SLOW: [2.0]}], []) == ([], None)


def test_a_table_whose_own_does_not_run_is_beaten(monkeypatch):
    _, verdict = verdict_of(monkeypatch, [{SLOW: [2.0]}] * 2, [{SLOW: [2.0] * 20}] * 2)
    assert verdict.faster
    assert "the table's own does not run" in str(verdict)


def test_cells_with_and_without_a_mask_agree_on_the_pieces(monkeypatch):
    cells = [CELL, dataclasses.replace(CELL, dropout_p=0.0)]
    table = Gemm(64, 64, 64, 4, 3, pieces=2)
    best = dataclasses.replace(table, pieces=4)
    whole = dataclasses.replace(table, pieces=1)
    screened = [{table: [3.0], best: [1.0], whole: [2.0]}, {table: [1.0]}]
    timed = [{table: [3.0] * 20, best: [1.0] * 20}, {table: [1.0] * 20, best: [1.0] * 20}]
    _, verdict = verdict_of(monkeypatch, screened, timed, "dx", cells)
    assert verdict.best == best
    assert verdict.ratio[0] == 0.5


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_interpreter_is_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [("--kernels=down,up", "'up' is none of down, "), ("--tokens=8,many", "int() with base 10")],
)
def test_lists_of_what_there_is_not_are_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        tune.main([option])
    assert message in capsys.readouterr().err


def test_cells_that_no_launcher_takes_are_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--kernels=few_rows", "--tokens=65", "--jobs=1"])
    assert "few_rows take none of these cells" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tune") / "folder" / "rows.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "bench.tune", "--kernels=fill_dx,dx", "--tokens=8", "--ranks=2",
            "--limit=2", "--jobs=2", f"--output={path}",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


def test_rows_say_what_was_tried_where_and_how_fast(run):
    _, rows = run
    screened = [row for row in rows if row["stage"] == "screen"]
    assert [row["kernel"] for row in screened] == ["fill_dx"] * 3 + ["dx"] * 3
    assert [row["is_table"] for row in screened] == [True, False, False] * 2
    for row in rows:
        assert row.keys() == {
            "commit", "python", "torch", "triton", "threads", "gpu", "capability", "driver",
            "kernel", "table", "entry", "m", "k", "n", "r", "dropout_p", "dtype", "device",
            "stage", "config", "is_table", "rounds", "p10_ms", "median_ms", "p90_ms",
            "over_table", "gb_s", "tflop_s", "reason",
        }  # fmt: skip
        assert (row["torch"], row["device"], row["reason"]) == (torch.__version__, "cpu", None)
        assert (row["m"], row["r"], row["dropout_p"]) == (8, 2, 0.1)
        assert (row["n"] is None) == (row["kernel"] == "fill_dx")
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["over_table"][1] <= row["over_table"][0] <= row["over_table"][2]
        fields = dict(row["config"])
        kind = {"Skinny": Skinny, "Gemm": Gemm}[fields.pop("type")]
        assert kind is (Skinny if row["table"] == "fill" else Gemm)
        assert fields == dataclasses.asdict(kind(**fields))


def test_terminal_names_every_cell_and_ends_with_a_verdict_on_each_table(run):
    output, _ = run
    assert "6 launches in 2 processes\n0 fail" in output
    assert "fill_dx m8 k48 r2 p0.1 float32, fill.py 'wide': 3 of 3 timed" in output
    assert "dx m8 k48 n40 r2 p0.1 float32, dx.py 'float32': 3 of 3 timed" in output
    _, verdicts = output.split("tables that are beaten: ")
    assert "fill.py interpreter wide: " in verdicts
    assert "dx.py interpreter float32: " in verdicts
