"""Which implementations take part, what they ask for, and what they build."""

import os

import torch
from torch import nn

from bench import implementations
from bench.cells import Cell
from bench.implementations import VARIABLE, Implementation, choose

CELL = Cell(m=32, k=48, n=40, r=4, dropout_p=0.0, mode="forward+backward")


def test_context_sets_the_algorithm_and_puts_it_back(monkeypatch):
    fused = Implementation("lora_kernels[fused]", implementations.ours, algorithm="fused")
    ours = Implementation("lora_kernels", implementations.ours)
    for before in (None, "reference"):
        monkeypatch.delenv(VARIABLE, raising=False)
        if before:
            monkeypatch.setenv(VARIABLE, before)
        with fused.context():
            assert os.environ[VARIABLE] == "fused"
        assert os.environ.get(VARIABLE) == before
        with ours.context():
            assert os.environ.get(VARIABLE) == before


def test_choose_leaves_out_peers_that_do_not_fit_a_cell():
    def names(**changes):
        cell = Cell(**{**vars(CELL), **changes})
        return set(choose(cell, (), implementations.IMPLEMENTATIONS))

    assert names() == {"frozen", "loralib", "peft", "addmm", "unsloth", "lora_kernels"}
    assert "unsloth" not in names(dropout_p=0.1)
    groups = {"enable_lora": (True, False)}
    assert names(**groups) == {"frozen", "loralib", "lora_kernels"}
    assert names(**groups, out_splits=(30, 10)) == {"frozen", "lora_kernels"}
    assert names(device="cuda") >= {
        "compiled peft", "compiled formula", "lora_kernels[fused]", "lora_kernels[addmm]",
    }  # fmt: skip


def test_choose_always_takes_the_floor_and_this_package():
    assert list(choose(CELL, ["peft"], implementations.IMPLEMENTATIONS)) == [
        "frozen",
        "peft",
        "lora_kernels",
    ]


def test_frozen_is_the_base_layer_and_trains_nothing():
    problem = CELL.problem()
    module = implementations.frozen(problem)
    expected = nn.functional.linear(problem.x, problem.w, problem.bias)
    assert torch.equal(module(problem.x), expected)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_loralib_layer_keeps_a_weight_as_it_is_stored():
    problem = CELL.problem()
    problem.w, problem.bias = problem.w.T.contiguous().T, None  # as a Conv1D stores it
    for build in (implementations.loralib, implementations.ours):
        layer = build(problem)
        assert layer.weight.shape == (48, 40)
        assert layer.weight.is_contiguous()
        assert layer.bias is None
