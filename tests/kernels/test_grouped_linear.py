"""lora_grouped_linear by the kernels: the formula, the same bits, and no look at the device."""

import pytest
import torch

from lora_kernels.dispatch import fallback
from lora_kernels.kernels import (
    grouped_expand,
    grouped_gemm,
    grouped_grad,
    grouped_linear,
    grouped_reduce,
    grouped_shrink,
    split_k_reduce,
)
from lora_kernels.spec import Needs
from lora_kernels.testing.grouped_problem import make_grouped_problem
from lora_kernels.testing.tolerance import assert_close
from tests.functional.test_grouped_linear import CASES, SIZES, every_case, solve

kernels = pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
LAUNCHING = (
    grouped_expand, grouped_gemm, grouped_grad, grouped_reduce, grouped_shrink, split_k_reduce,
)  # fmt: skip


def check(problem):
    exact = problem.solve(torch.float64)
    # In fewer bits plain PyTorch would round what each op here leaves in float32.
    wide = problem.solve(torch.float32)
    for name, value in solve(problem).items():
        like = problem.dy if name == "y" else getattr(problem, name)
        assert value.dtype == like.dtype
        assert_close(value, exact[name], wide[name].to(like.dtype), name)
    assert not fallback.failures()


@kernels
@every_case
def test_result_and_gradients_are_those_of_the_formula(case, algorithm, seed, device):
    check(make_grouped_problem(SIZES, 24, 16, 3, device=device, **case))


@kernels
@pytest.mark.parametrize("name", ["adapters, index", "experts, behind"])
@pytest.mark.parametrize("lora_dtype", [torch.float16, torch.float32], ids=str)
def test_float16(lora_dtype, name, algorithm, seed, device):
    options = {"dtype": torch.float16, "lora_dtype": lora_dtype, "device": device}
    check(make_grouped_problem(SIZES, 24, 16, 3, **options, **CASES[name]))


@kernels
@pytest.mark.parametrize("k", [23, 24], ids=["no grouped_mm", "grouped_mm"])
def test_experts_of_any_width_and_order(k, algorithm, seed, device):
    """Stored [E, K, N], and of a width that grouped_mm refuses; factors are views."""
    problem = make_grouped_problem(SIZES, k, 16, 3, device=device, experts=5, behind=2)
    problem.w = problem.w.mT.contiguous().mT
    problem.a = problem.a[:1].expand(5, -1, -1)
    problem.b = problem.b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    check(problem)


@kernels
def test_rows_that_are_not_its_are_neither_read_nor_written(algorithm, seed, device):
    problem = make_grouped_problem(SIZES, 8, 12, 2, device=device, experts=5, behind=3)
    clean = solve(problem)
    problem.x[-3:] = torch.nan
    problem.dy[-3:] = torch.nan
    dirty = solve(problem)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    assert not dirty["y"][-3:].any()
    assert not dirty["x"][-3:].any()


@kernels
def test_ends_beyond_the_rows_reach_no_memory_of_others(algorithm, seed, device):
    """On a GPU nobody looks at them before the kernels, which stop at the last row."""
    problem = make_grouped_problem((3, 4), 8, 6, 2, device=device)
    problem.ends = torch.tensor((3, 99), dtype=torch.int32, device=device)
    rest = (None, None, problem.seeds, problem.spec)
    operands = (problem.x, problem.w, problem.a, problem.b, None)
    wrong, right = (
        grouped_linear.lora_grouped_linear_forward(algorithm, *operands, ends, *rest)
        for ends in (problem.ends, problem.ends.clamp(max=7))
    )
    for one, other in zip(wrong, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("algorithm", ["fused", "addmm"])
@pytest.mark.parametrize("name", ["adapters, index", "experts, behind"])
def test_nothing_waits_for_the_device(name, algorithm, monkeypatch):
    """Meta tensors have no values: whatever asks for one raises."""
    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", lambda kernel, grid, **arguments: None)
    monkeypatch.setattr(grouped_linear, "_takes_grouped_mm", lambda left, w: False)
    problem = make_grouped_problem(SIZES, 8, 6, 2, device="cpu", **CASES[name])

    def meta(tensor):
        return None if tensor is None else tensor.to("meta")

    monkeypatch.setattr("lora_kernels.kernels.config.capability_of", lambda device: (9, 0))
    monkeypatch.setattr("lora_kernels.kernels.config.num_sms", lambda device: 132)
    monkeypatch.setattr(grouped_shrink, "num_sms", lambda device: 132)
    x, w, a, b, dy = (meta(getattr(problem, name)) for name in ("x", "w", "a", "b", "dy"))
    routing = [meta(t) for t in (problem.ends, problem.groups, problem.index, problem.seeds)]
    spec = problem.spec
    y, h = grouped_linear.lora_grouped_linear_forward(
        algorithm, x, w, a, b, meta(problem.bias), *routing, spec
    )
    assert y.shape == dy.shape
    grads = grouped_linear.lora_grouped_linear_backward(
        algorithm, dy, x, h, w, a, b, *routing, len(x), spec, Needs(*[True] * 5)
    )
    assert [g.shape for g in grads] == [t.shape for t in (x, w, a, b, w[..., 0])]
