"""Cases: what is tried of a launcher at a shape, what is skipped, what is timed and told."""

import dataclasses

import pytest
import torch

from lora_kernels.tuning import candidates, cases, launchers, stopwatch
from lora_kernels.tuning.candidates import source
from lora_kernels.tuning.launchers import LAUNCHERS, Gemm, Skinny
from lora_kernels.tuning.shapes import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16, device=DEVICE)
FEW = dataclasses.replace(SHAPE, m=13)  # what few_rows takes
LARGE = [name for name in LAUNCHERS if not LAUNCHERS[name].dots and name != "few_rows"]
FAILING, WRONG, SLOW, RIGHT = (Skinny(16, cols, 4, 2) for cols in (16, 32, 64, 128))


def shape_for(name):
    return FEW if name == "few_rows" else SHAPE


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(stopwatch, "MIN_ROUNDS", 3)
    monkeypatch.setattr(stopwatch, "WARMUP_ROUNDS", 0)


def test_cases_of_few_rows_are_those_that_it_runs():
    cells = [dataclasses.replace(SHAPE, m=m, dropout_p=p) for m in (16, 17, 65) for p in (0.0, 0.1)]
    tuned = [(case.shape.m, case.shape.dropout_p) for case in cases.cases(["few_rows"], cells, 1)]
    assert tuned == [(16, 0.0), (16, 0.1), (17, 0.0)]


@pytest.mark.parametrize(
    ("m", "entry", "tma"), [(16, "few_rows", {False}), (80, "tma", {True, False})]
)
@pytest.mark.parametrize("name", LARGE)
def test_cases_try_descriptors_if_the_entry_is_for_matrices_that_they_hold(
    name, m, entry, tma, monkeypatch
):
    table = dict.fromkeys(("few_rows", "pointer", "tma"), Gemm(16, 16, 16, 4, 1))
    target = launchers.target_of(torch.device(DEVICE))
    monkeypatch.setitem(LAUNCHERS[name].module.CONFIGS, target, table)
    (case,) = cases.cases([name], [dataclasses.replace(SHAPE, m=m)], limit=None)
    assert case.entry == entry
    assert {config.tma for config in case.others} == tma


def test_cases_join_shapes_that_a_launcher_does_not_tell_apart():
    cells = [dataclasses.replace(FEW, n=n, dropout_p=p) for n in (40, 56) for p in (0.0, 0.25)]
    counts = dict.fromkeys(LAUNCHERS, 0)
    for case in cases.cases(list(LAUNCHERS), cells, limit=1):
        counts[case.name] += 1
    assert counts == {
        "down": 2, "forward": 2, "few_rows": 4, "dy_pass": 2, "dx": 4, "da": 2, "fill_y": 2,
        "fill_dx": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_cases_try_the_tables_own_once(name, monkeypatch):
    grid = candidates.grid(name, shape_for(name), tma=True)
    entries = ("narrow", "wide", "pointer", "tma", "float32", "up_to_16")
    table = {entry: grid[5] for entry in entries}
    target = launchers.target_of(torch.device(DEVICE))
    monkeypatch.setitem(LAUNCHERS[name].module.CONFIGS, target, table)
    (case,) = cases.cases([name], [shape_for(name)], limit=None)
    assert case.table == grid[5]
    assert set(grid) - {grid[5]} >= set(case.others)
    assert case.table not in case.others
    assert len(case.others) > 10


@pytest.mark.parametrize(("m", "dtype"), [(16, torch.float32), (80, torch.float16)], ids=str)
def test_measure_times_every_launcher_by_its_table_and_by_candidates(m, dtype, few_rounds):
    cell = dataclasses.replace(SHAPE, m=m, dtype=dtype)
    for case in cases.cases(list(LAUNCHERS), [cell], limit=1):
        configs = (case.table, *case.others)
        measured, samples = cases.measure(case, configs, {}, seconds=0)
        assert [row["reason"] for row in measured] == [None, None]
        assert samples.keys() == set(configs)
        assert all(row["gb_s"] > 0 and row["tflop_s"] > 0 for row in measured)


@pytest.fixture
def faulty(monkeypatch, few_rounds):
    """A case of down whose candidates have faults, and the configurations that were launched."""
    (case,) = cases.cases(["down"], [SHAPE], limit=1)
    case = dataclasses.replace(case, others=(SLOW, FAILING, WRONG, RIGHT))
    launched, launcher = [], LAUNCHERS["down"]

    def call(o, config):
        launched.append(config)
        if config == FAILING:
            raise RuntimeError("out of resource:\n shared memory")
        for _ in range(6 if config == SLOW else 1):
            (h,) = launcher.call(o, config)
        return (h * 1.05 if config == WRONG else h,)

    monkeypatch.setitem(launchers.LAUNCHERS, "down", dataclasses.replace(launcher, call=call))
    return case, launched


def test_measure_skips_failing_and_wrong_candidates_and_ranks_a_slow_one_behind(faulty):
    case, _ = faulty
    configs = (case.table, *case.others)
    measured, samples = cases.measure(case, configs, {}, seconds=0)
    by_config = dict(zip(configs, measured, strict=True))
    assert by_config[FAILING]["reason"] == "RuntimeError: out of resource: shared memory"
    assert by_config[WRONG]["reason"].startswith("wrong: result rms error")
    assert samples.keys() == {case.table, SLOW, RIGHT}
    assert by_config[SLOW]["over_table"][0] > 2 * by_config[RIGHT]["over_table"][0]
    for config in (FAILING, WRONG):
        assert by_config[config]["median_ms"] is by_config[config]["over_table"] is None

    lines = cases.report(case, measured, configs).splitlines()
    assert [line.rpartition("  ")[2] for line in lines[1:4]] == [
        source(case.table), source(RIGHT), source(SLOW),
    ]  # fmt: skip
    assert f"no time: {source(FAILING)}: RuntimeError" in lines[4]
    assert f"no time: {source(WRONG)}: wrong" in lines[5]
    assert "3 of 5 timed" in lines[0]


def test_measure_does_not_launch_again_what_is_known_to_fail(faulty):
    case, launched = faulty
    measured, _ = cases.measure(case, (case.table, SLOW), {SLOW: "it died"}, seconds=0)
    assert [row["reason"] for row in measured] == [None, "it died"]
    assert set(launched) == {None}  # the launcher asks its table
