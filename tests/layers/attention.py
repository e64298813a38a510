"""A tiny attention block whose layers share_inputs joins, and which operators a call reaches."""

import pytest
import torch
from torch import nn

import lora_kernels as lora
from tests.op_calls import Calls

# Elsewhere torch.compile breaks the graph there, and the numbers are the same.
traces_joined_layers = pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="TorchDynamo of 2.8 cannot trace joined layers"
)

NAMES = ("q_proj", "k_proj", "v_proj")
SHARED, ALONE = "lora_shared_linear_forward", "lora_linear_forward"


class Attention(nn.Module):
    """Three linears over one input, or keys and values of another, and one on top."""

    def __init__(self, width=12, kv=8, dropout=0.0, **options):
        super().__init__()
        options = {"r": 3, "lora_alpha": 6, "lora_dropout": dropout, **options}
        self.q_proj = lora.LoRALinear(width, width, **options)
        self.k_proj = lora.LoRALinear(width, kv, **options)
        self.v_proj = lora.LoRALinear(width, kv, **options)
        self.o_proj = lora.LoRALinear(width + 2 * kv, width, **options)
        for layer in self.children():
            nn.init.normal_(layer.lora_B)

    def forward(self, x, context=None):
        context = x if context is None else context
        joined = torch.cat([self.q_proj(x), self.k_proj(context), self.v_proj(context)], -1)
        return self.o_proj(joined)


def make(device, **options):
    model = Attention(**options).to(device)
    lora.mark_only_lora_as_trainable(model)
    return model, torch.randn(2, 5, 12, device=device)


def calls_of(function, *args):
    with Calls() as calls:
        function(*args)
    return [name for name in calls.names if name.endswith("forward")]
