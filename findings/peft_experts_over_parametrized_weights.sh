#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU), LoRA on a 3-D parameter by target_parameters.
#
# Behaviour: if the parameter has a parametrization already, as quantisation of experts makes one,
# the one that PEFT registers for a forward is not removed after it. Every forward adds another, and
# the adapter counts once more in each: the output drifts from call to call, with only a warning
# ("Could not find any LoRA parametrization"). Without a parametrization of its own the output stays.
#
# Seen: parametrizations after 0, 1, 2, 3 forwards: 1, 2, 3, 4; the update in the k-th forward is k
# times that of the first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat > "$folder/find.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

warnings.simplefilter("ignore")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        return torch.bmm(x, self.weight)


class Same(nn.Module):
    """What dequantises: here it changes nothing."""

    def forward(self, weight):
        return weight * 1


def updates(parametrized):
    """Parametrizations, and the size of the update, of three forwards."""
    torch.manual_seed(0)
    net = nn.Sequential(Experts()).requires_grad_(False)
    if parametrized:
        parametrize.register_parametrization(net[0], "weight", Same())
    x = torch.randn(2, 3, 4)
    base = net(x)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(net, config)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    held = model.base_model.model[0].get_base_layer()
    sizes, counts = [], []
    with torch.no_grad():
        for _ in range(3):
            sizes.append((model(x) - base).norm().item())
            found = getattr(held, "parametrizations", {})
            counts.append(len(found["weight"]) if found else 0)
    return counts, [size / sizes[0] for size in sizes]


print("without:", updates(False))
print("with:   ", updates(True))
assert updates(False) == ([0, 0, 0], [1, 1, 1])
counts, sizes = updates(True)
assert counts == [2, 3, 4], counts
assert all(abs(size - k) < 1e-3 for k, size in enumerate(sizes, 1)), sizes
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/find.py"
