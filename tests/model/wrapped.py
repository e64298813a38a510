"""Models that checkpoint_wrapper or torch.compile has put a module into or around."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from lora_kernels import apply_lora


class Net(nn.Module):
    """Two blocks of which one is checkpointed whole, a single checkpointed layer, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)
        )
        self.single = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(self.single(x))


def checkpointed(model):
    apply_activation_checkpointing(
        model, check_fn=lambda module: module in (model.blocks[0], model.single)
    )
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "checkpointed": checkpointed,
    "root checkpointed": checkpoint_wrapper,
    "compiled": compiled,
    "both": lambda model: compiled(checkpointed(model)),
}


each_way = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def adapted(base, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "single"], **options}
    model = apply_lora(copy.deepcopy(base), modules_to_save="head", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
