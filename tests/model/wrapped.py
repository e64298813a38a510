"""Models that checkpoint_wrapper or torch.compile has put a module into or around."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from lora_kernels import apply_lora


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks of which one is checkpointed whole, a single checkpointed layer, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.single = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.single(x))


def checkpointed(model):
    apply_activation_checkpointing(
        model, check_fn=lambda module: module in (model.blocks[0], model.single)
    )
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def with_compiled_parts(model):
    """A block and a single layer, each compiled by itself, as regional compilation does."""
    model.blocks[1] = compiled(model.blocks[1])
    model.single = compiled(model.single)
    return model


def in_fsdp(model):
    """FSDP around a layer and around all; needs a process group."""
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process shards nothing
        model.blocks[0].up = FullyShardedDataParallel(model.blocks[0].up, **options)
        return FullyShardedDataParallel(model, **options)


class FabricModule(nn.Module):
    """What Lightning Fabric puts around a model; the same keys, other paths."""

    __module__ = "lightning.fabric.wrappers"

    def __init__(self, model):
        super().__init__()
        self._forward_module, self._original_module = model, model

    def forward(self, x):
        return self._forward_module(x)

    def state_dict(self, *args, **kwargs):
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self._original_module.load_state_dict(*args, **kwargs)


def in_deepspeed(model):
    """DeepSpeed's engine, as far as paths go."""
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    engine.forward = lambda self, x: self.module(x)
    wrapper = engine()
    wrapper.module = model
    return wrapper


def in_lightning(model):
    """What Lightning calls a model in a user's LightningModule."""
    kind = type("LightningModule", (nn.Module,), {"__module__": "lightning.pytorch.core.module"})
    training = type("Training", (kind,), {"forward": lambda self, x: self.model(x)})()
    training.model, training.loss = model, nn.MSELoss()
    return training


WRAPPERS = {
    "parts compiled": with_compiled_parts,
    "compiled in compiled": lambda model: compiled(with_compiled_parts(model)),
    "checkpointed in compiled": lambda model: with_compiled_parts(checkpointed(model)),
    "in Lightning": in_lightning,
    "in Fabric": FabricModule,
    "in DeepSpeed": in_deepspeed,
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
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
