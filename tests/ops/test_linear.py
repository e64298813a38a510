"""The ops behind lora_linear: what PyTorch asks of a custom op."""

import pytest
import torch

from lora_kernels.spec import Needs
from lora_kernels.testing.problem import make_problem
from tests.calls import call, solve

FORWARD = torch.ops.lora_kernels.lora_linear_forward.default
BACKWARD = torch.ops.lora_kernels.lora_linear_backward.default
QKV = [(8, True), (8, False), (8, True)]


@pytest.mark.parametrize(
    ("algorithm", "lora_dtype"),
    [("reference", torch.float64), ("fused", torch.float32), ("addmm", torch.float32)],
    indirect=["algorithm"],
)
@pytest.mark.parametrize("groups", [None, QKV], ids=["linear", "merged"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_linear_passes_opcheck(groups, dropout_p, lora_dtype, seed, device):
    problem = make_problem(
        (2, 3), 8, 24, 2, device=device, lora_dtype=lora_dtype, dropout_p=dropout_p, groups=groups
    )
    splits = problem.splits
    flat = (problem.seed, problem.scaling, dropout_p, list(splits.sizes), list(splits.enabled))
    operands = (problem.x, problem.w, problem.a, problem.b)
    torch.library.opcheck(FORWARD, (*operands, problem.bias, *flat))
    _, h = FORWARD(*operands, problem.bias, *flat)
    for needs in (Needs(*[True] * 5), Needs(x=True, b=True), Needs(a=True, bias=True)):
        args = (problem.dy, problem.x, h, problem.w, problem.a, problem.b, *flat, list(needs))
        torch.library.opcheck(BACKWARD, args)


def test_a_tensor_that_outlived_its_transform_is_what_it_wrapped(device):
    problem, outlived = make_problem(5, 8, 6, 2, device=device), []
    torch.func.grad(lambda x: (outlived.append(x), x.sum())[1])(problem.x)
    expected = call(problem)
    problem.x = outlived.pop()
    assert torch.equal(call(problem), expected)


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
@pytest.mark.parametrize(
    ("lora_dtype", "uniform"), [(torch.float16, True), (torch.float32, False)], ids=str
)
def test_both_passes_ask_for_factors_of_their_dtype(
    algorithm, lora_dtype, uniform, asked, seed, device
):
    """So that what was measured for factors in another dtype serves them, and no others."""
    problem = make_problem(5, 8, 6, 2, device=device, dtype=torch.float16, lora_dtype=lora_dtype)
    solve(problem)
    assert [(shape.backward, shape.uniform) for shape in asked] == [
        (False, uniform),
        (True, uniform),
    ]
