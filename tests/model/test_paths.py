"""Paths of modules, in words and under wrappers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import LoRALinear
from lora_kernels.model.paths import (
    adapted_layers,
    as_names,
    check_names_exist,
    in_model_order,
    is_inside,
    is_named,
    join,
    load_plain_state,
    lora_layers,
    named_modules,
    pattern_without_wrappers,
    plain_state,
    split,
    unwrapped,
    without_wrappers,
)
from tests.model import wrapped


@pytest.mark.parametrize("path", ["a", "a.b", "a.b.c"])
def test_split_undoes_join(path):
    assert join(*split(path)) == path
    assert join("", path) == path
    assert split(join(path, "weight")) == (path, "weight")


def test_is_inside_and_is_named_go_by_whole_names():
    assert is_inside("a.b", ["a"])
    assert is_inside("a", ["a"])
    assert not is_inside("ab", ["a"])
    assert not is_inside("b.a", ["a"])
    assert is_named("b.a", ["a"])
    assert is_named("a", ["a"])
    assert not is_named("ba", ["a"])
    assert not is_named("a.b", ["a"])


@pytest.mark.parametrize(
    ("names", "expected"), [(None, []), ("a", ["a"]), (("a", "b.c"), ["a", "b.c"])]
)
def test_as_names_gives_a_list(names, expected):
    assert as_names("modules_to_save", names, nn.Linear(2, 2)) == expected


@pytest.mark.parametrize("names", [3, "", ["a", None], [""]])
def test_as_names_raises_for_what_is_not_a_name(names):
    with pytest.raises(ValueError, match="modules_to_save must be a name or a list of names"):
        as_names("modules_to_save", names, nn.Linear(2, 2))


def test_as_names_takes_wrappers_off():
    names = ["module.blocks.1._orig_mod.up", "_orig_mod.down", "module.head", "own.module"]
    model = nn.DataParallel(wrapped.with_compiled_parts(wrapped.Net()))
    assert as_names("x", names, model) == ["blocks.1.up", "down", "head", "own.module"]


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        (r"blocks\.\d\._orig_mod\.up", r"blocks\.\d\.up"),
        (r".*_orig_mod.up", r".*up"),
        (
            r"(single\._orig_mod|blocks\.0\._checkpoint_wrapped_module\.up)",
            r"(single|blocks\.0\.up)",
        ),
        (r"^_fsdp_wrapped_module\.head$", "^head$"),
        (r"my_orig_mod\.up|_orig_models", r"my_orig_mod\.up|_orig_models"),
    ],
)
def test_pattern_without_wrappers(pattern, plain):
    assert pattern_without_wrappers(pattern) == plain


def test_in_model_order_is_that_of_a_model_built_so():
    paths = ["z.q", "a.x", "z.norm", "b", "a.x.y"]
    model = nn.Module()
    for path in paths:
        module = model
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
    assert in_model_order(paths) == [path for path, _ in model.named_modules() if path]


@wrapped.each_way
def test_named_modules_and_plain_state_are_those_of_the_plain_model(wrap):
    plain = wrapped.Net()
    model = wrap(copy.deepcopy(plain))
    paths = [path for path, _ in named_modules(model) if path != "loss"]  # beside the model
    assert paths == [path for path, _ in plain.named_modules()]
    state = plain_state(model)
    state.pop("n_averaged", None)  # of AveragedModel itself
    wrapped.assert_same(state, plain.state_dict())
    assert type(unwrapped(model)) is wrapped.Net


@wrapped.each_way
def test_load_plain_state_loads_what_has_no_wrappers(wrap):
    plain = wrapped.Net()
    model = wrap(wrapped.Net())
    load_plain_state(model, plain.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(model(x), plain(x))


def test_without_wrappers_leaves_the_models_own_names_alone():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module, self.model = inner, nn.ModuleDict({"module": nn.Linear(2, 2)})

    model = Outer(wrapped.compiled(nn.Linear(2, 2)))
    ddp = nn.DataParallel(model)
    keys = {without_wrappers(key, ddp) for key in ddp.state_dict()}
    assert keys == {"module.weight", "module.bias", "model.module.weight", "model.module.bias"}
    assert without_wrappers("module.model.base_layer._orig_mod.x") == "module.model.base_layer.x"
    lightning = wrapped.in_lightning(model)
    assert without_wrappers("model.module.weight", lightning) == "module.weight"
    lightning.head = nn.Linear(2, 2)  # the model is more than what is called model
    assert without_wrappers("model.module.weight", lightning) == "model.module.weight"


def test_unwrapped_looks_through_wrappers_around_wrappers():
    model = wrapped.Net()
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)  # needs a process group
    nn.Module.__init__(ddp)
    ddp.module = torch.compile(model, backend="eager")
    assert unwrapped(torch.compile(ddp, backend="eager")) is model
    assert unwrapped(model) is model


def test_lora_layers_are_those_without_factors_too():
    model = nn.Sequential(LoRALinear(2, 2), nn.Linear(2, 2), LoRALinear(2, 2, r=1))
    assert [path for path, _ in lora_layers(model)] == ["0", "2"]
    assert adapted_layers(model) == {"2": model[2]}
    assert list(adapted_layers(copy.deepcopy(model))) == ["2"]


def test_check_names_exist_names_the_one_that_does_not():
    model = wrapped.Net()
    check_names_exist(model, ["head", "1.up", "blocks.0"])
    with pytest.raises(ValueError, match="'ead'"):
        check_names_exist(model, ["head", "ead"])
