"""PEFT's DoRA under patch_peft(): what is fused, PEFT given our mask, and what is left to PEFT."""

import copy
import re

import peft
import pytest
import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from lora_kernels import dropout, frozen_weight, patch_peft, report, unpatch_peft
from lora_kernels.functional import seeds
from lora_kernels.integrations.peft import dora
from lora_kernels.testing.dora_problem import make_dora_problem
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.peft_models import (
    assert_as_without,
    both_bases,
    lora_layer,
    quantised_lora_layer,
    step,
    with_lora,
)

pytestmark = pytest.mark.usefixtures("unpatched")
VECTOR = "lora_magnitude_vector.default"


def output_for(x):
    return lambda layer: {"y": layer(x.to(layer.base_layer.weight.dtype))}


def layer_of(device, **options):
    return lora_layer(device, use_dora=True, **options)


@both_bases
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lora_dtype", [torch.float32, None], ids=["float32 adapters", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer(training, dtype, lora_dtype, bias, conv1d, seed, device):
    layer = layer_of(device, conv1d=conv1d, bias=bias).train(training).to(dtype)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(layer, name).to(lora_dtype or dtype)
    x = torch.randn(3, 5, 16, device=device, dtype=dtype)
    assert_as_without(layer, output_for(x), fused=1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model(family, seed, device):
    model = with_lora(family, device, use_dora=True)
    layers = sum(isinstance(m, DoraLinearLayer) for m in model.modules())
    assert_as_without(model, step, fused=layers)


def test_pefts_law_of_dropout(monkeypatch, seed, device):
    """PEFT is given the mask of the patched call."""
    layer = layer_of(device).double().train()
    x = torch.randn(6, 16, device=device, dtype=torch.float64)
    own = torch.tensor([7919], device=device)
    monkeypatch.setattr(seeds, "draw_seeds", lambda *_: own)

    class Given(nn.Dropout):
        def forward(self, x):
            mask = dropout.keep_mask(own, *x.shape, 0.25).to(x)
            return x * mask * dropout.keep_scale(0.25)

    theirs, results = copy.deepcopy(layer), []
    layer.lora_dropout["default"] = nn.Dropout(0.25)
    theirs.lora_dropout["default"] = Given(0.25)
    patch_peft()
    for each, fused in ((layer, 1), (theirs, 0)):
        leaf = x.clone().requires_grad_()
        with Calls() as calls:
            y = each(leaf)
        assert calls.fused == fused
        y.pow(2).sum().backward()
        grads = [p.grad for p in each.parameters() if p.requires_grad]
        results.append([y, leaf.grad, *grads])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_dropout_is_off_if_the_layer_is_in_eval_mode(seed, device):
    """PEFT's DoRA asks the layer, and not its dropout."""
    layer = layer_of(device, lora_dropout=0.5).eval()
    layer.lora_dropout.train()
    x = torch.randn(6, 16, device=device)
    assert_as_without(layer, output_for(x), fused=1)


def hook(layer):
    layer.get_submodule(VECTOR).register_forward_hook(lambda *_: None)


def subclass(layer):
    class Other(DoraLinearLayer):
        pass

    layer.get_submodule(VECTOR).__class__ = Other


def variant_subclass(layer):
    class Other(DoraLinearVariant):
        pass

    layer.lora_variant["default"] = Other()


def own_forward(layer):
    vector = layer.get_submodule(VECTOR)
    vector.forward = lambda x, **options: type(vector).forward(vector, x, **options) * 2


def offload(layer):
    layer.ephemeral_gpu_offload = True


def double(layer):
    layer.lora_magnitude_vector.double()


def weight_subclass(layer):
    class Other(nn.Parameter):
        pass

    vector = layer.get_submodule(VECTOR)
    vector.weight = Other(vector.weight.data)


LEFT_TO_PEFT = {
    "hook": (hook, "lora_magnitude_vector has hooks"),
    "subclass": (subclass, "lora_magnitude_vector is a Other"),
    "variant's subclass": (variant_subclass, "its adapter is a Other"),
    "forward": (own_forward, "lora_magnitude_vector has a forward of its own"),
    "offload": (offload, "ephemeral_gpu_offload is set"),
    "float64": (double, "lora_magnitude_vector.weight is float64 and its base torch.float32"),
    "weight's subclass": (weight_subclass, "lora_magnitude_vector.weight is a Other"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_the_rest_is_left_to_peft(change, reason, seed, device):
    layer = layer_of(device)
    change(layer)
    assert_left_to_peft(layer, reason, device)


def assert_left_to_peft(layer, reason, device):
    x = torch.randn(3, 16, device=device)
    expected = layer(x)
    patch_peft()
    with Calls() as calls:
        actual = layer(x)
    assert calls.fused == 0
    assert torch.equal(actual, expected)
    (row,) = report(layer)
    assert not row.fused
    assert re.search(reason, row.reason), row.reason


@pytest.mark.skipif(not hasattr(peft_dora, "ENABLE_DORA_CACHING"), reason="PEFT before 0.19")
def test_caching_is_left_to_peft(monkeypatch, seed, device):
    monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
    assert_left_to_peft(layer_of(device).eval(), "ENABLE_DORA_CACHING", device)


@pytest.mark.parametrize("kind", [DoraLinearVariant, DoraLinearLayer])
def test_a_forward_replaced_after_the_patch_is_left_to_peft(kind, monkeypatch, seed, device):
    patch_peft()
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **options: real(*args, **options) * 2)
    (row,) = report(layer_of(device))
    assert f"{kind.__name__}.forward has been replaced" in row.reason


def test_an_unknown_version_is_left_to_peft(monkeypatch, seed, device):
    from lora_kernels.integrations.peft import guard

    monkeypatch.setattr(guard, "VARIANTS", {})
    monkeypatch.setattr(dora, "VARIANTS", guard.VARIANTS)
    known = {**dora._KNOWN, "DoraLinearLayer.forward": ("0" * 64,)}
    monkeypatch.setattr(dora, "_KNOWN", known)
    assert_left_to_peft(layer_of(device), "its adapter is a DoraLinearVariant", device)


def test_samples_with_adapters_of_their_own_are_left_to_peft(seed, device):
    layer = layer_of(device)
    patch_peft()
    x = torch.randn(2, 3, 16, device=device)
    with pytest.raises(ValueError, match="DoRA"):  # which does not take them
        layer(x, adapter_names=["default", "__base__"])


def test_report_says_so(seed, device):
    layer = layer_of(device)
    (row,) = report(layer)
    assert not row.fused
    patch_peft()
    (row,) = report(layer)
    assert row.fused
    assert row.reason.startswith("DoRA; ")
    unpatch_peft()


def test_two_adapters_take_turns(seed, device):
    layer = layer_of(device)
    layer.update_layer("other", 2, lora_alpha=2, config=peft.LoraConfig(use_dora=True))
    layer.set_adapter(["other"])
    x = torch.randn(3, 16, device=device)
    assert_as_without(layer, output_for(x), fused=1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8", "torchao-float8"])
def test_over_quantised_bases(kind, bias, seed):
    """Against float64 over the dense weight; PEFT rounds that to 16 bits, or does not run."""
    layer = quantised_lora_layer(kind, bias=bias, lora={"use_dora": True})
    problem = make_dora_problem((3, 11), 128, 64, 4, device="cpu", bias=bias)
    base = layer.get_base_layer()
    problem.w = frozen_weight(base).dense(torch.float32)
    problem.bias = base.bias.detach() if bias else None
    factors = [getattr(layer, f"lora_{name}")["default"].weight for name in "AB"]
    problem.a, problem.b = (factor.detach() for factor in factors)
    magnitude = layer.lora_magnitude_vector["default"].weight
    problem.magnitude = magnitude.detach()
    exact, baseline = problem.solve(torch.float64), problem.solve()
    patch_peft()
    (row,) = report(layer)
    assert row.fused, row.reason
    assert "DoRA" in row.reason
    x = problem.x.detach().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *factors, magnitude], problem.dy)
    results = dict(zip(("y", "x", "a", "b", "magnitude"), (y.detach(), *grads), strict=True))
    for name, result in results.items():
        assert_close(result, exact[name], baseline[name], name)
