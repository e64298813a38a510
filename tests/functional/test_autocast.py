"""float32 factors under autocast: all functions multiply them as PyTorch's operators do there."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from lora_kernels import lora_grouped_linear, lora_linear, lora_shared_linear
from lora_kernels.testing.tolerance import assert_close
from tests.frozen import Int8Linear, int8_weight

M, K, N, R, S = 70, 40, 24, 4, 2.0
ENDS = (30, M)
LEAVES = ("x", "a", "b")


def make(dtype, device, x_dtype=None):
    """Two layers with the same sizes. Factors are float32; w is what the int8 layer makes dense."""
    layer = Int8Linear(N, K, bias=False, dtype=dtype, device=device)
    dense = layer.dense(dtype)
    return SimpleNamespace(
        layer=layer,
        x=torch.randn(M, K, device=device).to(x_dtype or dtype),
        w=torch.stack([dense, dense.flip(0)]),
        a=torch.randn(2, R, K, device=device) / K**0.5,
        b=torch.randn(2, N, R, device=device) / R**0.5,
        magnitude=torch.rand(N, device=device) + 0.5,
        dy=torch.randn(M, 2 * N, device=device).to(dtype),
    )


def plain(p, i=0, rows=slice(None)):
    """The formula in PyTorch's operators."""
    x = p.x[rows]
    return linear(x, p.w[i]) + linear(linear(x, p.a[i]), p.b[i]) * S


def plain_dora(p):
    norm = (p.w[0] + S * p.b[0] @ p.a[0]).detach().norm(dim=1)
    return p.magnitude / norm * plain(p)


def grouped(p, w):
    ends = torch.tensor(ENDS, dtype=torch.int32, device=p.x.device)
    return lora_grouped_linear(p.x, w, p.a, p.b, ends, scaling=S)


def by_rows(p, experts):
    parts = slice(0, ENDS[0]), slice(*ENDS)
    if not experts:
        p.w = torch.stack([p.w[0], p.w[0]])
    return torch.cat([plain(p, i, rows) for i, rows in enumerate(parts)])


def frozen(p):
    return int8_weight(p.layer, dtype=p.w.dtype)


CASES = {
    "linear": (lambda p: lora_linear(p.x, p.w[0], p.a[0], p.b[0], scaling=S), plain),
    "shared": (
        lambda p: torch.cat(lora_shared_linear(p.x, p.w, p.a, p.b, scalings=[S, S]), 1),
        lambda p: torch.cat([plain(p, 0), plain(p, 1)], 1),
    ),
    "adapters": (lambda p: grouped(p, p.w[0]), lambda p: by_rows(p, False)),
    "experts": (lambda p: grouped(p, p.w), lambda p: by_rows(p, True)),
    "dora": (
        lambda p: lora_linear(
            p.x, p.w[0], p.a[0], p.b[0], magnitude=p.magnitude, scaling=S
        ),
        plain_dora,
    ),
    "quantised": (lambda p: lora_linear(p.x, frozen(p), p.a[0], p.b[0], scaling=S), plain),
    "quantised dora": (
        lambda p: lora_linear(
            p.x, frozen(p), p.a[0], p.b[0], magnitude=p.magnitude, scaling=S
        ),
        plain_dora,
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize(("function", "formula"), CASES.values(), ids=CASES)
every_algorithm = pytest.mark.parametrize(
    "algorithm", ["reference", "fused", "addmm"], indirect=True
)


def solve(formula, p, autocast=None):
    """y and the gradients, under autocast to that dtype, or in float64 if there is none."""
    p = copy.copy(p)
    if autocast is None:
        for name in ("x", "w", "a", "b", "magnitude", "dy"):
            setattr(p, name, getattr(p, name).double())
    for name in LEAVES:
        setattr(p, name, getattr(p, name).detach().clone().requires_grad_())
    enabled = autocast is not None
    with torch.autocast(p.x.device.type, autocast or torch.bfloat16, enabled=enabled):
        y = formula(p)
    grads = torch.autograd.grad(y, [getattr(p, name) for name in LEAVES], p.dy[:, : y.shape[1]])
    return {"y": y.detach(), **dict(zip(LEAVES, grads, strict=True))}


@every_algorithm
@every_case
def test_results_are_as_close_as_pytorchs_own(function, formula, algorithm, seed, device):
    # The interpreter multiplies bfloat16 as integers.
    interpreted = algorithm != "reference" and device.type == "cpu"
    dtype = torch.float16 if interpreted else torch.bfloat16
    p = make(dtype, device)
    exact, baseline = solve(formula, p), solve(formula, p, dtype)
    for name, result in solve(function, p, dtype).items():
        expected = getattr(p, name).dtype if name in LEAVES else dtype
        assert result.dtype == expected, name
        assert_close(result, exact[name], baseline[name].to(expected), name)


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
@pytest.mark.parametrize("under", [True, False])
@every_case
def test_kernels_round_float32_factors_under_autocast_alone(
    function, formula, under, algorithm, seed, device, monkeypatch
):
    from lora_kernels.kernels import numerics

    asked, of = [], numerics._numerics

    def spied(dtype, uniform, *machine):
        asked.append((dtype, uniform))
        return of(dtype, uniform, *machine)

    monkeypatch.setattr(numerics, "_numerics", spied)
    p = make(torch.float16, device)
    if under:
        solve(function, p, torch.float16)
    else:
        p.a, p.b = p.a.requires_grad_(), p.b.requires_grad_()
        y = function(p)
        y.backward(p.dy[:, : y.shape[1]])
    assert len(asked) > 1
    assert set(asked) == {(torch.float16, under)}


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
def test_float32_x_meets_factors_in_the_dtype_that_a_base_layer_multiplies_in(
    algorithm, seed, device, monkeypatch
):
    """bitsandbytes' layers take float32 to their own dtype and back, under autocast, too."""
    from lora_kernels.kernels import numerics

    asked, of = set(), numerics._numerics
    monkeypatch.setattr(numerics, "_numerics", lambda *given: asked.add(given[:2]) or of(*given))
    p = make(torch.float16, device, x_dtype=torch.float32)
    own = p.layer.forward
    p.layer.forward = lambda x: own(x.half()).float()
    p.dy = p.dy.float()
    results = solve(CASES["quantised"][0], p, torch.float16)
    assert asked == {(torch.float16, True)}
    exact = solve(plain, p)
    baseline = solve(lambda p: plain(p).float(), p, torch.float16)
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)


def test_factors_keep_their_bits_if_autocast_has_another_dtype_than_experts(seed):
    from lora_kernels.functional.operands import under_autocast
    from lora_kernels.spec import GroupedSpec

    spec, x, factor = GroupedSpec((1.0,), (0.0,)), torch.ones(2, 2), torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert under_autocast(spec, x.bfloat16(), factor, factor).narrow
        assert under_autocast(spec, x.half(), factor, factor) == spec
