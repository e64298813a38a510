"""PEFT models and layers, and the comparison of what they do with the patch and without."""

import collections
import copy

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.testing.tolerance import assert_close, assert_close_together
from tests.op_calls import Calls
from tests.quantized import quantised
from tests.tiny_models import BASES, TARGETS, randomise

UPSTREAM = PeftLinear.forward
both_bases = pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])


def config(family, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], **options}
    return peft.LoraConfig(fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **options)


def with_lora(family, device, *, base=None, **options):
    base = BASES[family]() if base is None else base
    return randomise(peft.get_peft_model(base, config(family, **options))).to(device)


def step(model, **kwargs):
    """logits, loss and the gradients of one training step."""
    model.zero_grad()
    ids = tokens(model)
    y = model(input_ids=ids, **kwargs).logits
    loss = nn.functional.cross_entropy(y.flatten(0, 1), ids.flatten())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "loss": loss.detach(), **grads}


def logits(model, **kwargs):
    with torch.no_grad():
        return {"logits": model(input_ids=tokens(model), **kwargs).logits}


def tokens(model):
    return torch.arange(28, device=next(model.parameters()).device).view(4, 7) * 5 % 13


def assert_as_without(model, run, *, fused):
    """run(model) gives the same results with the patch, by so many calls of the two operations.

    The model as a whole is compared in float64, to the accuracy of float32: rounding in fewer bits
    grows from layer to layer, with or without the patch. In the dtypes that it has, every layer is
    compared on the inputs that it meets. run may change the model, if it does the same again on
    what it left.
    """
    double = copy.deepcopy(model).double()
    exact, expected = run(double), run(model)
    patch_peft()
    in_double = run(double)
    with Calls() as calls:
        actual = run(model)
    alone = collections.defaultdict(list)

    def hook(layer, args, _):
        solve_layer(layer, *args, alone)

    handles = [layer.register_forward_hook(hook) for layer in peft_layers(model)]
    run(model)
    for handle in handles:
        handle.remove()
    unpatch_peft()

    assert calls.fused == fused
    assert actual.keys() == expected.keys() == in_double.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        if fused == 0:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
        assert_close(in_double[name].float(), exact[name].double(), exact[name].float(), name)
    for (name, _), triples in alone.items():
        assert_close_together(triples, name)


def solve_layer(layer, x, alone):
    """Solves the layer on this x and random gradients by itself.

    Appends (patched, in float64, PEFT's) of y and each gradient to alone[name, dtype].
    """
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        exact_layer = copy.deepcopy(layer).double()
        dy = torch.randn_like(UPSTREAM(layer, x))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def solve(forward, layer, dtype):
        leaves = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        leaves["x"] = x.to(dtype).requires_grad_()
        y = forward(layer, leaves["x"])
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
        given = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
        return {"y": y.detach(), **given}

    exact = solve(UPSTREAM, exact_layer, torch.float64)
    expected = solve(UPSTREAM, layer, x.dtype)
    actual = solve(PeftLinear.forward, layer, x.dtype)
    assert actual.keys() == expected.keys() == exact.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        triple = [solved[name] for solved in (actual, exact, expected)]
        if "magnitude" in name:  # made of what x's dtype keeps, see reference/dora.py
            triple[0], triple[2] = triple[0].to(x.dtype), triple[2].to(x.dtype)
        alone[name, triple[0].dtype].append(triple)


def peft_layers(model):
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


class Net(nn.Module):
    """One layer [.., 16] -> [.., 12]."""

    def __init__(self, conv1d, bias):
        super().__init__()
        self.layer = Conv1D(12, 16) if conv1d else nn.Linear(16, 12, bias=bias)
        if conv1d and not bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)


def lora_layer(device, *, conv1d=False, bias=True, base=None, **options):
    net = Net(conv1d, bias) if base is None else base
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **options}
    model = peft.get_peft_model(net, peft.LoraConfig(fan_in_fan_out=conv1d, **options))
    layer = model.base_model.model.layer.to(device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return layer


class QuantisedNet(nn.Module):
    """One quantised layer [.., 128] -> [.., 64], as a model that its quantiser has loaded."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = quantised(kind, **options)
        self.is_loaded_in_4bit = kind.startswith(("nf4", "fp4"))
        self.is_loaded_in_8bit = kind == "int8"

    def forward(self, x):
        return self.layer(x)


def quantised_lora_layer(kind, *, lora_dtype=torch.float32, lora=None, **options):
    """A PEFT LoRA layer over one of the kinds of tests/quantized.py; no factor of it is zero.

    lora: options of LoraConfig; the others are those of quantised().
    """
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], **(lora or {})}
    base = QuantisedNet(kind, **options)
    model = peft.get_peft_model(base, peft.LoraConfig(**lora), autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
        factor.to(lora_dtype)
        nn.init.normal_(factor.weight, std=factor.in_features**-0.5)
    return layer.train()
