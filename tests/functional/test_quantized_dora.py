"""lora_linear with a magnitude over a frozen weight that is not dense."""

import pytest
import torch

import lora_kernels
from lora_kernels.testing.dora_problem import make_dora_problem
from lora_kernels.testing.tolerance import assert_close
from tests.frozen import Int8Linear, int8_weight

NAMES = ("x", "a", "b", "bias", "magnitude")
every_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def make_case(dtype, device, dropout_p=0.0, m=(2, 9)):
    """A layer, and a problem whose w and bias are what the layer multiplies by."""
    layer = Int8Linear(24, 20, dtype=dtype, device=device)
    problem = make_dora_problem(m, 20, 24, 5, device=device, dtype=dtype, dropout_p=dropout_p)
    problem.w, problem.bias = layer.dense(dtype), layer.bias.detach()
    total = problem.w.double() + problem.spec.scaling * problem.b.double() @ problem.a.double()
    norm = torch.linalg.vector_norm(total, dim=1)
    problem.magnitude = (norm * (1 + 0.2 * torch.rand_like(norm))).to(dtype)
    return layer, problem


def call(layer, problem, x, a, b, magnitude):
    seed = problem.seed if problem.dropout_p else None
    options = {"scaling": problem.scaling, "dropout_p": problem.dropout_p, "seed": seed}
    return lora_kernels.lora_linear(x, int8_weight(layer), a, b, magnitude=magnitude, **options)


def solve(layer, problem):
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in NAMES}
    layer.bias.requires_grad_()
    y = call(layer, problem, *(leaves[name] for name in NAMES if name != "bias"))
    leaves["bias"] = layer.bias
    grads = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("products", ["own", "float32"])
@every_dropout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(dtype, dropout_p, products, seed, device, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", products)
    layer, problem = make_case(dtype, device, dropout_p)
    exact, baseline = problem.solve(torch.float64), problem.solve()
    for name, result in solve(layer, problem).items():
        assert_close(result, exact[name], baseline[name], name)


@every_dropout
def test_gradcheck_and_gradgradcheck(dropout_p, seed, device):
    layer, problem = make_case(torch.float64, device, dropout_p, m=3)
    norm = problem.magnitude  # constant for the gradients: of a and b it would have some
    leaves = [problem.x.requires_grad_(), norm.requires_grad_()]

    def function(x, magnitude):
        return call(layer, problem, x, problem.a, problem.b, magnitude)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_dropout
def test_nothing_of_the_weights_size_is_kept(dropout_p, seed, device):
    layer, problem = make_case(torch.float32, device, dropout_p)
    kept = []
    leaves = [getattr(problem, name).detach().requires_grad_() for name in NAMES if name != "bias"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call(layer, problem, *leaves)
    sizes = {tuple(tensor.shape) for tensor in kept}
    assert (24, 20) not in sizes
    large = [t for t in kept if t.numel() == y.numel()]
    assert len(large) == 1  # y itself, or c


def test_bad_magnitudes(seed, device):
    layer, problem = make_case(torch.float32, device)
    operands = problem.x, problem.a, problem.b
    with pytest.raises(ValueError, match=r"lora_linear: magnitude must have shape \[24\]"):
        call(layer, problem, *operands, problem.magnitude[:3])
    with pytest.raises(TypeError, match="lora_linear: magnitude must"):
        call(layer, problem, *operands, problem.magnitude.int())
