"""patch_peft() over quantised bases: the same numbers as PEFT's, and nothing of the base kept."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.quantization import find
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close
from tests.quantized import INEXACT, KINDS, quantised

peft = pytest.importorskip("peft")
N, K, R = 64, 128, 4


@pytest.fixture
def patched():
    patch_peft()
    yield
    unpatch_peft()


class Model(nn.Module):
    """One layer, as a model that its quantiser has loaded."""

    def __init__(self, kind, **options):
        super().__init__()
        self.lin = quantised(kind, N, K, **options)
        self.is_loaded_in_4bit = kind.startswith(("nf4", "fp4"))
        self.is_loaded_in_8bit = kind == "int8"

    def forward(self, x):
        return self.lin(x)


def adapted(kind, *, dropout=0.0, lora_dtype=torch.float32, **options):
    """PEFT's LoRA layer over a quantised one, with factors that are not zero."""
    config = peft.LoraConfig(r=R, lora_alpha=8, lora_dropout=dropout, target_modules=["lin"])
    model = peft.get_peft_model(Model(kind, **options), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.lin
    nn.init.normal_(layer.lora_A["default"].weight, std=K**-0.5)
    nn.init.normal_(layer.lora_B["default"].weight, std=R**-0.5)
    layer.lora_A.to(lora_dtype)
    layer.lora_B.to(lora_dtype)
    return layer.train()


def problem_of(layer, dtype, lora_dtype):
    """The same product over the dense weight."""
    base = layer.get_base_layer()
    problem = make_problem(
        (3, 11), K, N, R, device="cpu", dtype=dtype, lora_dtype=lora_dtype,
        bias=base.bias is not None,
    )  # fmt: skip
    problem.w = find(base).dense(torch.float32)
    problem.bias = None if base.bias is None else base.bias.detach().float()
    problem.a = layer.lora_A["default"].weight.detach()
    problem.b = layer.lora_B["default"].weight.detach()
    return problem


def solve(layer, problem):
    x = problem.x.detach().requires_grad_()
    factors = [getattr(layer, f"lora_{name}")["default"].weight for name in "AB"]
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *factors], problem.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip("xab", grads, strict=True))}


def baseline_of(problem):
    """Plain PyTorch's results in the problem's own dtypes."""
    own = copy.copy(problem)
    own.w = own.w.to(problem.x.dtype)
    own.bias = None if own.bias is None else own.bias.to(problem.x.dtype)
    return own.solve()


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_right_against_float64_over_the_dense_weight(kind, bias, dtype, lora_dtype, seed, patched):
    layer = adapted(kind, bias=bias, dtype=dtype, lora_dtype=lora_dtype)
    problem = problem_of(layer, dtype, lora_dtype)
    exact, baseline = problem.solve(torch.float64), baseline_of(problem)
    (row,) = report(layer)
    assert row.fused, row.reason
    results = solve(layer, problem)
    unpatch_peft()
    theirs = solve(layer, problem)
    patch_peft()
    if kind in INEXACT:  # y is what the layer's own kernels give, with the update
        own = layer.get_base_layer()(problem.x).double()
        x, a, b = (getattr(problem, name).double() for name in "xab")
        exact["y"] = own + problem.scaling * x @ a.T @ b.T
    for name, result in results.items():
        assert result.dtype == theirs[name].dtype, name
        assert_close(result, exact[name], baseline[name], name)
