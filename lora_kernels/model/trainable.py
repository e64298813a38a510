"""What trains besides lora_A and lora_B: mark_only_lora_as_trainable, and the record of it."""

import warnings
from collections.abc import Collection, Iterable
from typing import Literal, TypeAlias, get_args

from torch import nn

from lora_kernels.foreign import check_no_peft
from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.other_layers import INSTEAD, other_lora_layers
from lora_kernels.model.paths import (
    accept_plain_keys,
    adapted_layers,
    as_names,
    check_names_exist,
    is_inside,
    is_named,
    lora_layers,
    named_modules,
)

__all__ = [
    "BIAS", "Bias", "bias_names", "check_bias", "is_bias", "mark_only_lora_as_trainable",
    "print_trainable_parameters", "record_trained", "recorded_biases", "saved_paths", "untie",
    "with_tied",
]  # fmt: skip

Bias: TypeAlias = Literal["none", "all", "lora_only"]
BIAS = get_args(Bias)
# The attribute that says what mark_only_lora_as_trainable makes trainable of a module: all of it,
# "module", or its biases, "bias". deepcopy and pickle carry it along; state_dict does not see it.
_RECORD = "_trained_with_lora"


def mark_only_lora_as_trainable(
    model: nn.Module, bias: Bias = "none", modules_to_save: str | Iterable[str] | None = None
) -> None:
    """Freezes model, except its LoRA factors, the biases asked for and modules_to_save.

    Trainable: lora_A and lora_B of LoRA layers; other parameters whose own name starts with "lora_"
    stay as they are. bias: "none"; "all" biases (a parameter named bias, ..._bias or bias_...);
    "lora_only": those of LoRA layers. modules_to_save: paths, or ends of paths, of modules that
    train as a whole; lora_state_dict and save_adapter find them again.
    Warns: if model has no LoRA parameter, or none in a layer of this package, but in loralib's.
    Raises: NotImplementedError for another bias; ValueError for a name that no module has, and for
    a model with adapters of PEFT.
    Source: loralib's function, which also looks at names in the middle of a path.
    """
    check_bias(bias)
    check_no_peft(
        "mark_only_lora_as_trainable",
        model,
        "get_peft_model() has marked what trains, and model.set_adapter(name) marks it anew",
    )
    names = as_names("modules_to_save", modules_to_save, model)
    check_names_exist(model, names)
    trainable, left_alone = set(), set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(module, LoRALayer) and name in module.factor_names:
                trainable.add(id(parameter))
            elif name.startswith("lora_"):
                left_alone.add(id(parameter))
    record_trained(model, bias, names)
    accept_plain_keys(model)
    for module in model.modules():
        kind = module.__dict__.get(_RECORD)
        if kind == "module":
            trainable.update(id(parameter) for parameter in module.parameters())
        elif kind == "bias":
            trainable.update(id(module._parameters[name]) for name in bias_names(module))
    for parameter in model.parameters():
        if id(parameter) in trainable:
            parameter.requires_grad = parameter.is_floating_point()
        elif id(parameter) not in left_alone:
            parameter.requires_grad = False
    if not trainable and not left_alone:
        warnings.warn(
            "mark_only_lora_as_trainable: model has no LoRA parameter, so nothing trains now: "
            "apply_lora(model, ...) gives it LoRA layers",
            RuntimeWarning,
            stacklevel=2,
        )
    elif not any(isinstance(module, LoRALayer) for module in model.modules()):
        others = other_lora_layers(model)
        if others is not None:
            warnings.warn(
                f"mark_only_lora_as_trainable: these LoRA layers are not of this package, so they "
                f"train without its kernels: {others}. {INSTEAD}",
                RuntimeWarning,
                stacklevel=2,
            )


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters of model train, how many there are, and the share, as PEFT does.

    A parameter under several names counts once.
    """
    counts = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    every = sum(count for _, count in counts)
    train = sum(count for trains, count in counts if trains)
    share = 100 * train / every if every else 0.0
    print(f"trainable params: {train:,d} || all params: {every:,d} || trainable%: {share:.4f}")


# ---- biases ----


def check_bias(bias) -> Bias:
    """bias, one of loralib's three values. Raises: NotImplementedError that names it."""
    if bias not in BIAS:
        raise NotImplementedError(f"bias must be 'none', 'all' or 'lora_only', got {bias!r}")
    return bias


def is_bias(name: str) -> bool:
    """Whether a parameter of this own name is a bias: bias, in_proj_bias, bias_ih_l0."""
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def bias_names(module: nn.Module) -> list[str]:
    """Names of the parameters that module itself holds and that are biases."""
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and is_bias(name)
    ]


# ---- the records ----


def record_trained(model: nn.Module, bias: str, modules_to_save: Collection[str]) -> None:
    """Writes down which biases and modules train, replacing what was written before."""
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)
        if bias == "all" and bias_names(module):
            module.__dict__[_RECORD] = "bias"
    if bias == "lora_only":
        for _, layer in lora_layers(model):
            if bias_names(layer.weight_owner()):
                layer.weight_owner().__dict__[_RECORD] = "bias"
    for path, module in named_modules(model, remove_duplicate=False):
        if is_named(path, modules_to_save):
            module.__dict__[_RECORD] = "module"


def recorded_biases(model: nn.Module) -> str:
    """The bias argument that made the biases of model trainable."""
    owners = {id(m) for m in model.modules() if m.__dict__.get(_RECORD) == "bias"}
    if not owners:
        return "none"
    of_layers = {id(layer.weight_owner()) for layer in adapted_layers(model).values()}
    return "lora_only" if owners <= of_layers else "all"


def saved_paths(model: nn.Module, modules_to_save: Collection[str] = ()) -> list[str]:
    """Paths of the modules that train as a whole: recorded, or named here; none inside another."""
    check_names_exist(model, modules_to_save)
    paths: list[str] = []
    for path, module in named_modules(model):
        chosen = module.__dict__.get(_RECORD) == "module" or is_named(path, modules_to_save)
        if chosen and not is_inside(path, paths):
            paths.append(path)
    return paths


# ---- parameters that are tied to those of a module which trains as a whole ----


def untie(model: nn.Module, paths: Collection[str]) -> None:
    """Gives modules at paths copies of parameters that modules outside of them hold as well."""
    modules = dict(named_modules(model, remove_duplicate=False))
    for path in paths:
        inside = {id(module) for module in modules[path].modules()}
        copies = {
            id(parameter): parameter
            for module in model.modules()
            if id(module) not in inside
            for parameter in module._parameters.values()
            if parameter is not None
        }
        for parameter in modules[path].parameters():
            if id(parameter) in copies:
                copy = parameter.detach().clone()
                copies[id(parameter)] = nn.Parameter(copy, parameter.requires_grad)
        for module in modules[path].modules():
            for name, held in module._parameters.items():
                if id(held) in copies:
                    module._parameters[name] = copies[id(held)]


def with_tied(model: nn.Module, paths: Collection[str]) -> list[str]:
    """paths, and those of the modules outside of them that hold a parameter of theirs as well."""
    modules = dict(named_modules(model, remove_duplicate=False))
    inside = {id(module) for path in paths for module in modules[path].modules()}
    tied = {id(parameter) for path in paths for parameter in modules[path].parameters()}
    return [
        path
        for path, module in named_modules(model)
        if path in paths
        or (id(module) not in inside and not tied.isdisjoint(map(id, module._parameters.values())))
    ]
