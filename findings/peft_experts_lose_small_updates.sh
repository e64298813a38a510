#!/usr/bin/env bash
# PEFT 0.21.2, Transformers 5.23.0, torch 2.13.0 (CPU), LoRA on experts by target_parameters.
#
# Behaviour: the update is added to the whole stack of weights in the stack's dtype, twice in every
# forward (two baddbmm for each parameter), and the experts run on the sum. In bfloat16, which has 8
# bits of precision, most of an update that is small against the weights is lost there. lora_B
# starts at zero, so every run begins with such updates. In float32 all of it arrives.
#
# Seen, for a Mixtral experts module with weights of standard deviation 0.02:
#   update of 7e-5 of W: 0.04 of it is in the bfloat16 weights that the forward uses
#   update of 7e-4 of W: 0.40
#   update of 7e-3 of W: 1.00
#   baddbmm in a forward with two adapted parameters: 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat > "$folder/find.py" <<'PY'
import types

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

E, H, I, TOP = 4, 256, 256, 2


class Holder(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def build(dtype):
    torch.manual_seed(0)
    config = types.SimpleNamespace(
        num_local_experts=E, hidden_size=H, intermediate_size=I, hidden_act="silu",
        _experts_implementation="grouped_mm",
    )
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=names)
    return get_peft_model(Holder(experts).to(dtype), lora)


def kept(dtype, size):
    """How much of an update of this size, relative to W, is in the weight of a forward."""
    wrapper = build(dtype).base_model.model.experts.base_layer  # around gate_up_proj
    weight = wrapper.get_param().detach().clone().double()
    b = wrapper.lora_B["default"].weight
    nn.init.normal_(b)
    with torch.no_grad():
        rms = wrapper.get_delta_weight("default").double().square().mean().sqrt()
        b.mul_(size * weight.square().mean().sqrt() / rms)
        wide = wrapper.lora_A["default"].weight.double(), b.double()
        a3 = wide[0].view(E, -1, H)
        b3 = wide[1].view(b.shape[0], -1, E).permute(2, 0, 1)
        update = wrapper.scaling["default"] * torch.bmm(b3, a3)
        with wrapper._activate_lora(["default"]):
            used = wrapper.get_base_layer().gate_up_proj.double()
    return (((used - weight) * update).sum() / update.square().sum()).item()


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket is torch.ops.aten.baddbmm
        return func(*args, **(kwargs or {}))


for size, expected in ((7e-5, 0.04), (7e-4, 0.40), (7e-3, 1.00)):
    share = kept(torch.bfloat16, size)
    print(f"update of {size:.0e} of W: {share:.2f} of it is in the bfloat16 weights")
    assert abs(share - expected) < 0.03, share
assert abs(kept(torch.float32, 7e-4) - 1) < 1e-3
model = build(torch.bfloat16)
weights, ids = torch.rand(6, E).topk(TOP)
with Count() as count, torch.no_grad():
    model(torch.randn(6, H, dtype=torch.bfloat16), ids, weights.bfloat16())
print(f"baddbmm in a forward with two adapted parameters: {count.calls}")
assert count.calls == 4, count.calls
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/find.py"
