"""add_lora: y += scaling · (x_hat · aᵀ) · bᵀ onto the product of a base layer, and h."""

import dataclasses

import pytest
import torch

from lora_kernels.dropout import keep_scale
from lora_kernels.kernels.quantized_linear import add_lora
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import DTYPES, dropout, dtypes

MERGED = [(24, True), (16, False), (33, True)]


def updated(problem, dtype, y):
    """y plus the update, and h, in dtype."""
    x, a, b = (getattr(problem, name).to(dtype) for name in ("x", "a", "b"))
    rows, mask = x.view(-1, x.shape[-1]), problem.mask()
    if mask is not None:
        rows = rows * mask * keep_scale(problem.dropout_p)
    h = rows @ a.T
    parts = y.to(dtype).reshape(len(rows), -1).clone()
    for columns, b_rows, ranks in problem.splits.groups(b.shape[1]):
        parts[:, columns] += h[:, ranks] @ b[b_rows].T * problem.scaling
    return parts.view(y.shape), h


def problem_of(dtype, device, *, lora_dtype=None, dropout_p=0.25, groups=None):
    return make_problem(
        (3, 23), 71, 73, 9, device=device, dtype=dtype, lora_dtype=lora_dtype, bias=False,
        dropout_p=dropout_p, groups=groups, scaling=1.5,
    )  # fmt: skip


def check(problem, name, y):
    """add_lora onto y changes it in place and gives h."""
    before, pointer = y.clone(), y.data_ptr()
    h = add_lora(name, y, problem.x, problem.a, problem.b, problem.seed, problem.spec)
    assert y.data_ptr() == pointer
    exact, exact_h = updated(problem, torch.float64, before)
    plain, plain_h = updated(problem, torch.float32, before)
    assert_close(y, exact, plain.to(y.dtype), "y")
    assert_close(h, exact_h, plain_h, "h")
    assert h.is_contiguous()


@dropout
@pytest.mark.parametrize("groups", [None, MERGED], ids=["linear", "merged"])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@dtypes
def test_y_and_h(dtype, lora_dtype, groups, dropout_p, seed, device):
    problem = problem_of(dtype, device, lora_dtype=lora_dtype, dropout_p=dropout_p, groups=groups)
    name = "fused" if dropout_p else "addmm"  # they are one
    check(problem, name, problem.dy.clone())


@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
@dtypes
def test_y_in_another_dtype_than_x(dtype, y_dtype, seed, device):
    problem = problem_of(dtype, device, lora_dtype=torch.float32)
    check(problem, "addmm", problem.dy.to(y_dtype))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "leading dimensions swapped"])
def test_y_as_a_base_layer_may_leave_it(layout, seed, device):
    problem = problem_of(torch.float32, device)
    y = problem.dy
    if layout == "sliced":
        y = torch.cat([y, y], -1)[..., : y.shape[-1]]
    elif layout == "transposed":
        y = y.mT.contiguous().mT
    else:
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    check(problem, "fused", y)


def test_one_row_without_leading_dimensions(seed, device):
    problem = problem_of(torch.float32, device, dropout_p=0.0)
    problem = dataclasses.replace(problem, x=problem.x[0, 0], dy=problem.dy[0, 0])
    check(problem, "fused", problem.dy.clone())
