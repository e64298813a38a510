#!/usr/bin/env bash
# torchao 0.18.0, PEFT 0.21.2, torch 2.13.0 (CPU): LoRA over layers with dynamic int8 activations.
#
# Behaviour: the product of such a layer gives its input no gradient and raises nothing: the output
# of a frozen layer has requires_grad False although its input has True. Under LoRA the gradient of
# the layers below flows through lora_B·lora_A alone, so training goes on with wrong gradients.
# Weight-only int8 is right. Transformers calls both trainable.
#
# Seen, three layers with an adapter each, gradients of the lowest adapter against those over the
# dequantised weights: cosine 1.000 for weight-only int8, 0.037 for dynamic int8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    torch==2.13.0 torchao==0.18.0 peft==0.21.2 transformers==5.23.0
cat > "$folder/find.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

WIDTH = 64


def net(config, dequantised):
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    model = nn.Sequential(*layers).requires_grad_(False)
    quantize_(model, config)
    if dequantised:
        for layer in model:
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return model


def gradients(config, dequantised):
    """Of the lowest adapter's lora_A and lora_B, in one vector."""
    model = net(config, dequantised)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1", "2"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(32, WIDTH)
    model(x).square().sum().backward()
    lowest = [p.grad for n, p in model.named_parameters() if ".0.lora_" in n]
    return torch.cat([grad.flatten() for grad in lowest])


def found(config):
    x = torch.randn(2, WIDTH, requires_grad=True)
    differentiable = net(config, False)[0](x).requires_grad
    both = gradients(config, False), gradients(config, True)
    return differentiable, nn.functional.cosine_similarity(*both, dim=0).item()


dynamic = found(Int8DynamicActivationInt8WeightConfig())
weight_only = found(Int8WeightOnlyConfig())
print("weight-only int8: output requires_grad %s, cosine %.3f" % weight_only)
print("dynamic int8:     output requires_grad %s, cosine %.3f" % dynamic)
assert weight_only[0] and weight_only[1] > 0.99
assert not dynamic[0] and dynamic[1] < 0.2
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/find.py"
