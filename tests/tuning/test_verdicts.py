"""Whether a table's entry is beaten, and the line that is pasted then."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels.config import GemmConfig, SkinnyConfig, When
from lora_kernels.kernels.registry import KERNELS
from lora_kernels.tuning import candidates, cases, verdicts
from lora_kernels.tuning.candidates import source
from lora_kernels.tuning.cases import Case
from lora_kernels.tuning.shapes import Shape

SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16)
WHEN = When(tma=True, r=16)
FAILING, WRONG, SLOW, RIGHT = (SkinnyConfig(16, cols, 4, 2) for cols in (16, 32, 64, 128))


TABLES = [kernel.tiles for kernel in KERNELS.values() if kernel.tiles]
LAUNCHERS = [each.name for kernel in KERNELS.values() for each in kernel.launchers]
ALL_ENTRIES = {
    *(entry for table in TABLES for entries in table.values() for entry in entries),
    *((WHEN, config) for name in LAUNCHERS for config in candidates.grid(name, SHAPE, WHEN)),
}


def test_pasted_is_python_that_says_the_entry():
    table = SkinnyConfig(1, 1, 1, 1)
    names = {kind.__name__: kind for kind in (When, GemmConfig, SkinnyConfig)}
    for when, config in ALL_ENTRIES:
        verdict = verdicts.Verdict("gemm.py", when, table, config, (0.5, 0.4, 0.6), (0.5,))
        assert eval(f"[{verdict.pasted}]", names) == [(when, config)]
        assert verdict.pasted in str(verdict)


def verdict_of(monkeypatch, screened, timed, name="shrink", cells=(SHAPE, SHAPE)):
    """What confirm makes of seconds in the first run, and in the second one."""
    in_parts = GemmConfig(64, 64, 64, 4, 3, epilogue_subtile=2)
    table = in_parts if name == "gemm_bwd" else RIGHT
    group = [Case(name, cell, WHEN, table, ()) for cell in cells]
    again = iter(timed)

    def measure(case, configs, failed, seconds, stage):
        times = next(again)
        assert set(times) <= set(configs)
        return [{"stage": stage}] * len(configs), times

    monkeypatch.setattr(cases, "measure", measure)
    return verdicts.confirm(group, screened, seconds=0)


def test_confirm_times_the_best_over_the_cases_again_and_pastes_it_if_it_is_faster(monkeypatch):
    screened = [{RIGHT: [4.0], SLOW: [1.0], WRONG: [3.0]}, {RIGHT: [4.0], SLOW: [20.0], WRONG: [3]}]
    timed = [{RIGHT: [4.0] * 30, WRONG: [2.0] * 30}, {RIGHT: [12.0] * 30, WRONG: [12.0] * 30}]
    measured, verdict = verdict_of(monkeypatch, screened, timed)
    assert verdict.best == WRONG
    assert verdict.ratio == pytest.approx((14 / 16,) * 3)
    assert verdict.by_case == (0.5, 1.0)
    assert verdict.faster
    assert str(verdict).endswith(f"(When(tma=True, r=16), {source(WRONG)}),")
    assert [row["stage"] for row in measured] == ["confirm"] * 4


def test_confirm_does_not_paste_what_was_fast_by_chance(monkeypatch):
    screened = [{RIGHT: [4.0], SLOW: [3.0]}] * 2
    timed = [{RIGHT: [4.0, 5.0] * 10, SLOW: [5.0, 4.0] * 10}] * 2
    _, verdict = verdict_of(monkeypatch, screened, timed)
    assert verdict.best == SLOW
    assert not verdict.faster
    assert verdict.pasted not in str(verdict)
    assert f"keep {source(RIGHT)}" in str(verdict)


def test_confirm_times_nothing_if_the_table_is_best_or_nothing_ran_everywhere(monkeypatch):
    measured, verdict = verdict_of(monkeypatch, [{RIGHT: [1.0], SLOW: [2.0]}] * 2, [])
    assert measured == []
    assert not verdict.faster
    assert "nothing looked faster" in str(verdict)
    assert verdict_of(monkeypatch, [{RIGHT: [1.0]}, {SLOW: [2.0]}], []) == ([], None)


def test_confirm_beats_a_table_whose_own_does_not_run(monkeypatch):
    _, verdict = verdict_of(monkeypatch, [{SLOW: [2.0]}] * 2, [{SLOW: [2.0] * 20}] * 2)
    assert verdict.faster
    assert "the table's own does not run" in str(verdict)


def test_confirm_takes_subtiles_for_one_without_a_mask(monkeypatch):
    cells = [SHAPE, dataclasses.replace(SHAPE, dropout_p=0.0)]
    table = GemmConfig(64, 64, 64, 4, 3, epilogue_subtile=2)
    best = dataclasses.replace(table, epilogue_subtile=4)
    whole = dataclasses.replace(table, epilogue_subtile=1)
    screened = [{table: [3.0], best: [1.0], whole: [2.0]}, {table: [1.0]}]
    timed = [{table: [3.0] * 20, best: [1.0] * 20}, {table: [1.0] * 20, best: [1.0] * 20}]
    _, verdict = verdict_of(monkeypatch, screened, timed, "gemm_bwd", cells)
    assert verdict.best == best
    assert verdict.ratio[0] == 0.5
