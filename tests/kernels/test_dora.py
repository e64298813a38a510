"""Both algorithms of DoRA against float64, what is launched, and which matrix m is folded into."""

import collections
import functools

import pytest
import torch

from lora_kernels.kernels import dora, weight_norm
from lora_kernels.reference import dora as reference
from lora_kernels.spec import DoraNeeds
from lora_kernels.testing.dora_problem import make_dora_problem
from lora_kernels.testing.tolerance import assert_close, assert_close_together
from tests.calls import solve

LAWS = {"no dropout": (0.0, False), "PEFT's": (0.3, False), "low rank only": (0.3, True)}
every_law = pytest.mark.parametrize(("dropout_p", "low_rank_only"), LAWS.values(), ids=LAWS)
kernels = pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)


def refuse(module, name: str, monkeypatch):
    """Nothing is to call this function, whose signature stays."""

    @functools.wraps(getattr(module, name))
    def refused(*operands):
        pytest.fail(f"{name} was called")

    monkeypatch.setattr(module, name, refused)


@kernels
@every_law
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers_of_many_sizes(
    dtype, lora_dtype, dropout_p, low_rank_only, monkeypatch, seed, device
):
    refuse(reference, "dora_forward", monkeypatch)
    refuse(reference, "dora_backward", monkeypatch)
    found = collections.defaultdict(list)
    for shape in ((3, 64, 33, 7), (70, 40, 64, 16), (97, 31, 13, 3)):
        problem = make_dora_problem(
            *shape, device=device, dtype=dtype, lora_dtype=lora_dtype, dropout_p=dropout_p,
            low_rank_only=low_rank_only, bias=shape[0] != 70,
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


@every_law
@pytest.mark.parametrize("algorithm", ["fused", "addmm"])
def test_every_subset_of_gradients_has_the_same_bits(
    algorithm, dropout_p, low_rank_only, seed, device
):
    problem = make_dora_problem(
        (2, 35), 40, 24, 4, device=device, dropout_p=dropout_p, low_rank_only=low_rank_only
    )
    p = problem
    operands = p.x, p.w, p.a, p.b, p.bias, p.magnitude, p.seed
    y, h, norm, *c = dora.dora_forward(algorithm, *operands, p.spec)
    operands = p.dy, p.x, h, p.w, p.a, p.b, p.bias, p.magnitude, p.seed, norm, *(c or [y])

    def backward(needs):
        grads = dora.dora_backward(algorithm, *operands, p.spec, needs)
        return dict(zip([n for n, on in needs._asdict().items() if on], grads, strict=True))

    whole = backward(DoraNeeds(*[True] * 6))
    for name in DoraNeeds._fields:
        (alone,) = backward(DoraNeeds(**{name: True})).values()
        if name == "a" and algorithm == "addmm":  # by another kernel, which cuts the rows elsewhere
            assert_close(alone, whole[name].double(), whole[name], name)
        else:
            assert torch.equal(alone, whole[name]), name


@kernels
@pytest.mark.parametrize(("m", "folded"), [(64, "dy"), (65, "w")], ids=str)
def test_for_dx_m_is_folded_into_the_smaller_matrix(m, folded, monkeypatch, seed, device):
    problem, seen = make_dora_problem(m, 64, 24, 4, device=device), []

    def of_x_and_a(algorithm, dy, x, w, *others):
        changed = {"dy": not dy.equal(problem.dy), "w": not w.equal(problem.w)}
        seen.append([name for name, is_changed in changed.items() if is_changed])
        return real(algorithm, dy, x, w, *others)

    real = dora.of_x_and_a
    monkeypatch.setattr(dora, "of_x_and_a", of_x_and_a)
    solve(problem)
    assert seen == [[folded]]


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
