"""The reference against the one-line formula in float64 and its autograd."""

import itertools

import pytest
import torch

from lora_kernels import dropout
from lora_kernels.reference import linear as reference
from lora_kernels.spec import Needs
from lora_kernels.testing.problem import OPERANDS, make_problem
from lora_kernels.testing.tolerance import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
GROUPS = {
    "one": None,
    "first and last": [(8, True), (8, False), (8, True)],
    "unequal": [(17, True), (3, True), (4, True)],
    "last of two": [(1, False), (23, True)],
}


def forward(problem):
    return reference.lora_linear_forward(
        problem.x, problem.w, problem.a, problem.b, problem.bias, problem.seed, problem.spec
    )


def backward(problem, h, needs):
    grads = reference.lora_linear_backward(
        problem.dy, problem.x, h, problem.w, problem.a, problem.b, problem.seed, problem.spec,
        Needs(*needs),
    )  # fmt: skip
    asked = [name for name, needed in zip(OPERANDS, needs, strict=True) if needed]
    return dict(zip(asked, grads, strict=True))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_are_the_formula(dtype, dropout_p, groups, seed, device):
    problem = make_problem(
        (3, 5), 15, 24, 4, device=device, dtype=dtype, dropout_p=dropout_p, groups=groups
    )
    y, h = forward(problem)
    assert h.dtype == reference.accumulate_dtype(dtype)
    results = {"y": y, **backward(problem, h, [True] * 5)}
    exact, baseline = problem.solve(torch.float64), problem.solve()
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_over_a_16_bit_base(dtype, seed, device):
    problem = make_problem(
        33, 40, 24, 3, device=device, dtype=dtype, lora_dtype=torch.float32, dropout_p=0.2
    )
    y, h = forward(problem)
    results = {"y": y, **backward(problem, h, [True] * 5)}
    assert results["a"].dtype == results["b"].dtype == torch.float32
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_every_subset_of_gradients_reads_only_what_it_needs(needs, seed, device):
    problem = make_problem(6, 8, 12, 2, device=device, dropout_p=0.4, groups=[(6, True)] * 2)
    _, h = forward(problem)
    everything = backward(problem, h, [True] * 5)
    needs_x, needs_w, needs_a, needs_b, _ = needs
    if not (needs_w or needs_a):
        problem.x = None
    if not needs_x:
        problem.w = None
    if not (needs_x or needs_a):
        problem.a = problem.seed = None
    if not (needs_x or needs_a or needs_b):
        problem.b = None
    grads = backward(problem, h if needs_b else None, needs)
    assert len(grads) == sum(needs)
    for name, grad in grads.items():
        assert torch.equal(grad, everything[name])


def test_h_does_not_overflow_in_float16(device):
    problem = make_problem(4, 64, 8, 2, device=device, dtype=torch.float16, scaling=2**-12)
    problem.x.fill_(64.0)
    problem.a.fill_(64.0)  # h = 64·64·64, four times the largest float16
    problem.b.fill_(1.0)
    y, h = forward(problem)
    assert h.isfinite().all()
    exact = problem.solve(torch.float64)["y"]
    assert y.isfinite().all()
    assert (y.double() - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_low_rank_input_is_the_dropped_out_product(seed, device):
    problem = make_problem(7, 9, 4, 3, device=device, dtype=torch.float64, dropout_p=0.5)
    h = reference.low_rank_input(problem.x, problem.a, problem.seed, 0.5)
    mask = dropout.keep_mask(problem.seed, 7, 9, 0.5)
    expected = (problem.x * mask * dropout.keep_scale(0.5)) @ problem.a.T
    assert_close(h, expected, expected, "h")


@pytest.mark.parametrize("shape", [(0, 4, 6, 2), (5, 1, 6, 2), (5, 4, 1, 1), (1, 1, 1, 3)])
def test_empty_and_one_element_sizes(shape, seed, device):
    m, k, n, r = shape
    problem = make_problem(m, k, n, r, device=device, dropout_p=0.25).without_cancellation()
    y, h = forward(problem)
    results = {"y": y, **backward(problem, h, [True] * 5)}
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)
