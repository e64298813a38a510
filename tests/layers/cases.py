"""The linear layers that one test runs for all of, and what they are given."""

import copy

import pytest
import torch

from lora_kernels import LoRALinear, LoRAMergedLinear

LAYERS = {
    "linear": lambda **kw: LoRALinear(12, 20, r=3, lora_alpha=6, **kw),
    "fan_in_fan_out": lambda **kw: LoRALinear(12, 20, r=3, fan_in_fan_out=True, **kw),
    "merged_linear": lambda **kw: LoRAMergedLinear(12, 24, r=2, enable_lora=[True, False], **kw),
    "unequal groups": lambda **kw: LoRAMergedLinear(
        12, 24, r=2, enable_lora=[True, False, True], out_splits=(16, 4, 4), **kw
    ),
    "dora": lambda **kw: LoRALinear(12, 20, r=3, lora_alpha=6, use_dora=True, **kw),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def filled(layer, device):
    """layer with random lora_B, so that the update is not zero; on device."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape))
    return layer.to(device)


def output_and_gradients(layer, x, dy):
    """y, dx and the gradient of every parameter that gets one, in the layer's own dtype."""
    leaf = x.to(layer.weight.dtype, copy=True).requires_grad_()
    y = layer(leaf)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **grads}


def build(make, device, **options):
    """The layer with a random update."""
    layer = filled(make(**options), device)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape))
    return layer


def example(layer, device):
    """An input that the layer takes."""
    return torch.randn(5, 12, device=device).to(layer.weight.dtype)


def unmerged_output(layer, x):
    """What the layer gives in eval mode when it adds the delta on the fly."""
    twin = copy.deepcopy(layer).train()
    twin.merge_weights = False
    return twin.eval()(x)
