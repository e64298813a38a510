"""The check lets right implementations through and no wrong one."""

import dataclasses

import pytest
import torch
from torch import nn

from bench import accuracy, implementations, peers
from bench.cells import Cell

LINEAR = Cell(m=64, k=48, n=40, r=4, dropout_p=0.0)
LINEAR_DROPOUT = Cell(m=64, k=48, n=40, r=4, dropout_p=0.25)
MERGED = Cell(64, 48, 30, 4, 0.25, (True, False, True))


@pytest.mark.parametrize("cell", [LINEAR, LINEAR_DROPOUT], ids=str)
@pytest.mark.parametrize("name", ["loralib", "peft", "ours"])
def test_check_lets_linear_layers_through(name, cell):
    accuracy.check(name, getattr(implementations, name), cell.problem())


@pytest.mark.parametrize("cell", [LINEAR, LINEAR_DROPOUT], ids=str)
@pytest.mark.parametrize("build", [peers.Formula, peers.Addmm, implementations.frozen])
def test_check_lets_the_peers_written_here_through(build, cell):
    accuracy.check(build.__name__, build, cell.problem())


def test_check_lets_unsloth_through_without_dropout():
    accuracy.check("unsloth", peers.Unsloth, LINEAR.problem())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [implementations.ours, implementations.peft, peers.Addmm])
def test_check_works_in_16_bits(build, dtype):
    cell = dataclasses.replace(LINEAR_DROPOUT, dtype=dtype)
    accuracy.check(build.__name__, build, cell.problem())


@pytest.mark.parametrize("build", [implementations.ours, peers.Formula])
def test_check_lets_groups_of_unequal_size_through(build):
    cell = dataclasses.replace(MERGED, out_splits=(14, 8, 8))
    accuracy.check(build.__name__, build, cell.problem())


def test_check_refuses_a_wrong_floor():
    def doubled(problem):
        layer = implementations.frozen(problem)
        layer.weight.data *= 2
        return layer

    with pytest.raises(AssertionError, match="frozen y rms error"):
        accuracy.check("frozen", doubled, LINEAR.problem())


@pytest.mark.parametrize("name", ["loralib", "ours"])
def test_check_lets_merged_layers_through(name):
    accuracy.check(name, getattr(implementations, name), MERGED.problem())


class Wrong(nn.Module):
    """The formula on torch's dropout, with one thing that can be wrong about it."""

    def __init__(self, problem, *, scaling=1.0, dropout=None, grad_scale=1.0, rounded=False):
        super().__init__()
        self.base = implementations.frozen(problem)
        self.a, self.b = nn.Parameter(problem.a.clone()), nn.Parameter(problem.b.clone())
        self.scaling = problem.scaling * scaling
        self.dropout = nn.Dropout(problem.dropout_p if dropout is None else dropout)
        self.grad_scale, self.rounded = grad_scale, rounded

    def forward(self, x):
        a = self.a * self.grad_scale + (self.a * (1 - self.grad_scale)).detach()
        update = self.dropout(x) @ a.T @ self.b.T * self.scaling
        if self.rounded:
            update = update.bfloat16().float()
        return self.base(x) + update


def test_check_lets_the_formula_itself_through():
    accuracy.check("formula", Wrong, LINEAR_DROPOUT.problem())


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"scaling": 1.001}, "scales x wrongly|keeps"),
        ({"dropout": 0.0}, "keeps 1.0000 of x at dropout 0.25"),
        ({"dropout": 0.5}, "keeps"),
        ({"grad_scale": 0.5}, "wrong da rms error"),
        ({"rounded": True}, "wrong y rms error"),
    ],
)
def test_check_refuses_a_wrong_layer(fault, what):
    with pytest.raises(AssertionError, match=what):
        accuracy.check("wrong", lambda problem: Wrong(problem, **fault), LINEAR_DROPOUT.problem())


def test_check_refuses_a_backward_under_another_mask_than_the_forward():
    class OtherMask(nn.Module):
        def __init__(self, problem):
            super().__init__()
            self.right, self.other = Wrong(problem), Wrong(problem)
            self.other.a, self.other.b = self.right.a, self.right.b
            self.other.requires_grad_(True)

        def forward(self, x):
            y = self.right(x)
            again = self.other(x)
            return y.detach() + again - again.detach()

    with pytest.raises(AssertionError, match="wrong y rms error"):
        accuracy.check("wrong", OtherMask, LINEAR_DROPOUT.problem())
