"""The formula that can be differentiated, batched and recorded, against float64."""

import itertools

import pytest
import torch

from lora_kernels.reference import formula, linear
from lora_kernels.spec import Needs
from lora_kernels.testing.problem import OPERANDS, make_problem
from lora_kernels.testing.tolerance import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GROUPS = {
    "one": None,
    "first and last": [(8, True), (8, False), (8, True)],
    "last of two": [(1, False), (23, True)],
}
every_group = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)


def forward(problem, of=formula):
    return of.lora_linear_forward(
        problem.x, problem.w, problem.a, problem.b, problem.bias, problem.seed, problem.spec
    )


def backward(problem, h, needs, of=formula):
    grads = of.lora_linear_backward(
        problem.dy, problem.x, h, problem.w, problem.a, problem.b, problem.seed, problem.spec,
        Needs(*needs),
    )  # fmt: skip
    return dict(zip(itertools.compress(OPERANDS, needs), grads, strict=True))


@every_group
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, dropout_p, groups, seed, device):
    problem = make_problem(
        (3, 5), 17, 24, 4, device=device, dtype=dtype, dropout_p=dropout_p, groups=groups
    )
    exact, baseline = problem.solve(torch.float64), problem.solve()
    y, h = forward(problem)
    for name, result in ({"y": y} | backward(problem, h, [True] * 5)).items():
        assert_close(result, exact[name], baseline[name], name)


@every_group
def test_h_and_every_subset_of_gradients_are_the_references(groups, seed, device):
    problem = make_problem(
        6, 9, 24, 2, device=device, dtype=torch.float64, dropout_p=0.4, groups=groups
    )
    _, h = forward(problem)
    torch.testing.assert_close(h, forward(problem, of=linear)[1])
    low_rank = formula.low_rank_input(problem.x, problem.a, problem.seed, problem.dropout_p)
    torch.testing.assert_close(h, low_rank)
    for needs in itertools.product([False, True], repeat=5):
        ours, theirs = backward(problem, h, needs), backward(problem, h, needs, of=linear)
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_written_in_place(seed, device):
    problem = make_problem(6, 9, 24, 2, device=device, dropout_p=0.4)
    operands = [*problem.operands().values(), problem.dy, problem.seed]
    versions = [operand._version for operand in operands]
    _, h = forward(problem)
    backward(problem, h, [True] * 5)
    assert [operand._version for operand in operands] == versions
