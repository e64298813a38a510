"""A cell from beginning to end, with peers that are slow, wrong, broken or absent."""

import os
import time

import pytest
import torch
from torch import nn

from bench import counters, peers, providers, report, rows
from bench.measure import LayerSubject, measure
from bench.providers import PLAN, Provider, choose
from bench.shapes import Cell
from lora_kernels import plan

CELL = Cell(m=32, k=48, n=40, r=4, dropout_p=0.0, mode="forward+backward")


class Slow(peers.Formula):
    def forward(self, x):
        time.sleep(0.05)  # far beyond what a busy machine adds to a small layer
        return super().forward(x)


class Wrong(peers.Formula):
    def forward(self, x):
        return super().forward(x) * 1.001


def broken(problem):
    raise RuntimeError("out of everything\nand more")


FLOOR = Provider("frozen", providers.frozen)
OURS = Provider("lora_kernels", providers.lora_kernels)


@pytest.fixture(scope="module")
def measured():
    chosen = (
        FLOOR, OURS, Provider("slow", Slow), Provider("wrong", Wrong), Provider("broken", broken),
        Provider("absent", broken, needs="no_such_package"),
    )  # fmt: skip
    named = choose(CELL, (), chosen)
    return measure(CELL, LayerSubject(CELL), named, seconds=0.0)


def test_slow_peer_is_reported_as_slow(measured):
    by_name, _ = measured
    assert by_name["slow"]["median_ms"] > 50
    assert by_name["slow"]["ours_over_peer"][2] < 1.0
    assert not rows.lost(by_name["slow"])


def test_a_package_as_slow_as_that_loses_the_cell():
    slow = Provider("lora_kernels", Slow)
    fast = Provider("formula", peers.Formula)
    by_name, _ = measure(CELL, LayerSubject(CELL), choose(CELL, (), (FLOOR, fast, slow)), 0.0)
    assert rows.lost(by_name["formula"])
    assert "cells lost to a peer: 1 of 1" in report.terminal(list(complete(by_name)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "wrong: wrong scales x wrongly"),
        ("broken", "RuntimeError: out of everything"),
        ("absent", "no_such_package is not installed"),
    ],
)
def test_number_of_a_wrong_broken_or_absent_peer_is_withheld(measured, name, reason):
    by_name, samples = measured
    assert by_name[name]["withheld"] == reason
    assert name not in samples
    for field in ("p10_ms", "median_ms", "p90_ms", "over_frozen", "ours_over_peer"):
        assert by_name[name][field] is None
    text = report.terminal(list(complete(by_name)))
    assert f"  {name}: {reason} (1 cells)" in text
    _, table = text.split("ours/peer")
    assert name not in table


def complete(by_name):
    """Rows as a run leaves them, with the machine in them."""
    return ({**rows.LATER_FIELDS, **row} for row in by_name.values())


def test_the_others_are_measured_all_the_same(measured):
    by_name, samples = measured
    assert samples.keys() == {"frozen", "lora_kernels", "slow"}
    assert by_name["lora_kernels"]["median_ms"] > 0


def test_plan_is_set_around_a_provider_and_put_back(monkeypatch):
    planned = Provider("lora_kernels[fused]", providers.lora_kernels, plan="fused")
    for before in (None, "reference"):
        monkeypatch.delenv(PLAN, raising=False)
        if before:
            monkeypatch.setenv(PLAN, before)
        with planned.context():
            assert os.environ[PLAN] == "fused"
        assert os.environ.get(PLAN) == before
        with OURS.context():
            assert os.environ.get(PLAN) == before


@pytest.mark.filterwarnings("ignore:lora_kernels. plan fused:RuntimeWarning")
def test_number_of_a_plan_that_failed_is_withheld(monkeypatch):
    from lora_kernels.kernels import few_rows

    def launch(*args, **kwargs):
        raise RuntimeError("ptxas fell over\nand more")

    monkeypatch.setattr(few_rows, "launch", launch)
    monkeypatch.setattr(plan, "_failed", {})
    planned = [
        Provider(f"lora_kernels[{name}]", providers.lora_kernels, plan=name)
        for name in ("fused", "sandwich")
    ]
    named = choose(CELL, (), (FLOOR, *planned))
    by_name, samples = measure(CELL, LayerSubject(CELL), named, seconds=0.0)
    fused = by_name["lora_kernels[fused]"]
    assert fused["withheld"] == "plan fused failed: RuntimeError: ptxas fell over"
    assert fused["median_ms"] is None
    assert samples.keys() == {"frozen", "lora_kernels[sandwich]"}


def test_peers_that_do_not_fit_a_cell_take_no_part():
    def names(**changes):
        cell = Cell(**{**vars(CELL), **changes})
        return set(choose(cell, (), providers.PROVIDERS))

    assert names() == {"frozen", "loralib", "peft", "sandwich", "unsloth", "lora_kernels"}
    assert "unsloth" not in names(dropout_p=0.1)
    groups = {"enable_lora": (True, False)}
    assert names(**groups) == {"frozen", "loralib", "lora_kernels"}
    assert names(**groups, out_splits=(30, 10)) == {"frozen", "lora_kernels"}
    assert names(device="cuda") >= {
        "compiled peft", "compiled formula", "lora_kernels[fused]", "lora_kernels[sandwich]",
    }  # fmt: skip


def test_floor_and_this_package_always_take_part():
    assert list(choose(CELL, ["peft"], providers.PROVIDERS)) == ["frozen", "peft", "lora_kernels"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saved_bytes_count_what_is_kept_beyond_x(dropout_p):
    problem = Cell(**{**vars(CELL), "dropout_p": dropout_p}).problem()
    x = problem.x.requires_grad_()
    element, m, k, r = 4, CELL.m, CELL.k, CELL.r
    h = element * m * r
    seed = 8 * bool(dropout_p)
    assert counters.saved_bytes(providers.frozen(problem), x) == 0
    assert counters.saved_bytes(providers.lora_kernels(problem), x) == h + seed
    mask = m * k * bool(dropout_p)
    assert counters.saved_bytes(peers.Sandwich(problem), x) == h + mask
    if dropout_p == 0:
        assert counters.saved_bytes(peers.Unsloth(problem), x) == 0


def test_counters_of_a_cpu_leave_out_what_only_a_gpu_tells(measured):
    by_name, _ = measured
    assert by_name["lora_kernels"]["saved_bytes"] > 0
    assert by_name["lora_kernels"]["launches"] is by_name["lora_kernels"]["peak_bytes"] is None


def test_module_without_parameters_to_train_passes_as_the_floor_alone():
    subject = LayerSubject(CELL)
    subject.check(FLOOR)
    with pytest.raises(AssertionError, match="nothing y"):
        subject.check(Provider("nothing", lambda problem: nn.Linear(48, 40).requires_grad_(False)))


def test_operands_are_random_and_the_same_in_every_run():
    one, two = CELL.problem(), CELL.problem()
    for name, operand in one.operands().items():
        assert torch.equal(operand, getattr(two, name))
        assert operand.unique().numel() == operand.numel()
