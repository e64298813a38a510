"""Adapters of models that checkpoint_wrapper or torch.compile has put a module into or around."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    apply_lora,
    load_adapter,
    lora_state_dict,
    merged_state_dict,
    save_adapter,
)
from lora_kernels.layers.base import LoRALayer


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
wrapped_each_way = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


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


@wrapped_each_way
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_saved_adapter_loads_into_a_plain_model(tmp_path, wrap, bias, seed):
    base = Net()
    model = adapted(base, bias=bias)
    save_adapter(wrap(copy.deepcopy(model)), tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(lora_state_dict(loaded, bias), lora_state_dict(model, bias))
    assert_same(loaded.state_dict(), model.state_dict())


@wrapped_each_way
@pytest.mark.parametrize("has_lora", [True, False])
def test_an_adapter_loads_into_a_wrapped_model(tmp_path, wrap, has_lora, seed):
    base = Net()
    model = adapted(base)
    save_adapter(model, tmp_path)
    other = wrap(adapted(base) if has_lora else copy.deepcopy(base)).eval()
    assert load_adapter(other, tmp_path) is other
    x = torch.randn(5, 6)
    assert torch.equal(other(x), model.eval()(x))
    assert all(m.merged for m in other.modules() if isinstance(m, LoRALayer))


@pytest.mark.parametrize("wrap", [checkpointed, checkpoint_wrapper])
def test_lora_goes_into_a_checkpointed_model_and_out_of_it(wrap, seed):
    base = Net()
    torch.manual_seed(0)
    expected = adapted(base)
    torch.manual_seed(0)
    model = adapted(wrap(copy.deepcopy(base)))
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(merged_state_dict(model), merged_state_dict(expected))
    assert_same(lora_state_dict(model, "all"), lora_state_dict(expected, "all"))
    x = torch.randn(5, 6)
    model(x).sum().backward()
    expected(x).sum().backward()
    for actual, reference in zip(model.parameters(), expected.parameters(), strict=True):
        assert actual.requires_grad == reference.requires_grad
        if reference.requires_grad:
            assert torch.equal(actual.grad, reference.grad)


def test_wrappers_around_wrappers_are_looked_through(tmp_path, seed):
    model = adapted(Net())
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)  # needs a process group
    nn.Module.__init__(ddp)
    ddp.module = compiled(model)
    save_adapter(compiled(ddp), tmp_path)
    loaded = load_adapter(Net(), tmp_path)
    assert_same(lora_state_dict(loaded), lora_state_dict(model))
