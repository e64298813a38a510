"""Both algorithms of DoRA: which matrices m is folded into, and random layers against float64."""

import collections

import pytest
import torch

from lora_kernels.kernels import linear, weight_norm
from lora_kernels.reference import dora as reference
from lora_kernels.testing.dora_problem import make_dora_problem
from lora_kernels.testing.tolerance import assert_close, assert_close_together
from tests.calls import solve

kernels = pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)


@kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers_of_many_sizes(dtype, lora_dtype, dropout_p, seed, device):
    found = collections.defaultdict(list)
    for shape in ((3, 64, 33, 7), (70, 40, 64, 16), (97, 31, 13, 3)):
        problem = make_dora_problem(
            *shape, device=device, dtype=dtype, lora_dtype=lora_dtype, dropout_p=dropout_p,
            low_rank_only=True,
        )  # fmt: skip
        problem.magnitude[1] = 0
        exact, baseline = problem.solve(torch.float64), problem.solve()
        for name, result in solve(problem).items():
            triple = [result, exact[name], baseline[name]]
            if name == "magnitude":
                triple[0], triple[2] = result.to(dtype), baseline[name].to(dtype)
            found[name].append(triple)
    for name, triples in found.items():
        assert_close_together(triples, name)


@kernels
@pytest.mark.parametrize(("m", "folded"), [(64, "y"), (65, "w")], ids=str)
def test_m_is_folded_into_the_smaller_matrix(m, folded, algorithm, monkeypatch, seed, device):
    problem = make_dora_problem(m, 64, 24, 4, device=device)
    seen = []
    real_forward, real_backward = linear.lora_linear_forward, linear.lora_linear_backward

    def forward(algorithm, x, w, *others):
        seen.append("y" if w.equal(problem.w) else "w")
        return real_forward(algorithm, x, w, *others)

    def backward(algorithm, dy, x, h, w, *others):
        if others[-1].x:
            seen.append("y" if w.equal(problem.w) else "w")
        return real_backward(algorithm, dy, x, h, w, *others)

    monkeypatch.setattr(linear, "lora_linear_forward", forward)
    monkeypatch.setattr(linear, "lora_linear_backward", backward)
    solve(problem)
    assert seen == [folded] * 2


@kernels
@pytest.mark.parametrize("low_rank_only", [False, True])
def test_the_norms_of_a_step_are_one_launch(low_rank_only, monkeypatch, seed, device):
    problem = make_dora_problem(
        9, 40, 24, 4, device=device, dropout_p=0.3, low_rank_only=low_rank_only
    )
    problem.w = problem.w.repeat_interleave(2, 1)[:, ::2]  # no unit stride
    exact, baseline = problem.solve(torch.float64), problem.solve()
    launched, real = [], weight_norm.launch
    monkeypatch.setattr(
        weight_norm, "launch", lambda *args, **meta: launched.append(args) or real(*args, **meta)
    )
    monkeypatch.setattr(reference, "row_norms", None)
    for name, result in solve(problem).items():
        assert_close(result, exact[name], baseline[name], name)
    assert len(launched) == 1
