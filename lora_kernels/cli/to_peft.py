"""A file with the keys of loralib's lora_state_dict -> PEFT's directory.

The tensors are put into modules without base weights, at the paths that their keys give, and
save_adapter writes those.
"""

import argparse
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels import adapt, checkpoint
from lora_kernels.layers import LoRAEmbedding, LoRALayer, LoRALinear, LoRAMergedLinear

__all__ = ["to_peft"]

# What scripts put around a state dict, loralib's own example among them, and what DDP puts in front
# of every key.
_ENVELOPES = ("model_state_dict", "state_dict", "model")
_DDP = "module."
_FACTORS = ("lora_A", "lora_B")


def to_peft(source: Path, destination: Path, options: argparse.Namespace) -> list[str]:
    """Writes the adapter; lines that say what is in it.

    Raises: ValueError, OSError for what cannot be read, understood, expressed or written.
    """
    if options.lora_alpha is None:
        raise ValueError(f"{source}: its layers' lora_alpha is not in it: give --lora-alpha")
    state = _read(source)
    try:
        layers = _layers(state, options)
        model = nn.Module()
        for path, layer in layers.items():
            _owner(model, path).add_module(_split(path)[1], layer)
        bias, saved = _add_others(model, state, layers, options.modules_to_save)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except KeyError as error:  # a part of a key that PyTorch does not take as a module's name
        raise ValueError(f"{source}: a key does not fit a model: {error.args[0]}") from None
    adapt.record_trained(model, bias, saved)
    checkpoint.save_adapter(model, destination)
    return [f"{destination}: LoRA on {len(layers)} modules, bias={bias}, modules_to_save={saved}"]


def _read(source: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, without what scripts and DDP put around it."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{source}: holds more than tensors, or is damaged; a pickle can run code, so nothing "
            f"else in one is loaded"
        ) from None
    except Exception as error:  # damaged files fail in every way there is
        raise ValueError(f"{source}: torch.load cannot read it: {error}") from None
    for name in _ENVELOPES:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{source}: must hold a state dict, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source}: {key}: must be a tensor, got {type(value).__name__}")
    if all(key.startswith(_DDP) for key in state):
        state = {key.removeprefix(_DDP): value for key, value in state.items()}
    return state


def _layers(state: dict[str, Tensor], options: argparse.Namespace) -> dict[str, LoRALayer]:
    """A layer for every pair of factors, by path; its base weight has a shape and no values."""
    paths = sorted({_split(key)[0] for key in state if _split(key)[1] in _FACTORS})
    if not paths:
        raise ValueError("no key ends with lora_A or lora_B")
    if "" in paths:
        raise ValueError(
            "lora_A, lora_B: a LoRA layer that is the whole model has no name for PEFT: put it in "
            "a module"
        )
    enabled = _Numbers("--enable-lora", options.enable_lora, paths)
    splits = _Numbers("--out-splits", options.out_splits, paths)
    embeddings = _matches("--embedding", options.embedding, paths)
    layers = {}
    for path in paths:
        factors = _factors(path, state)
        layer = _layer(path, *factors, path in embeddings, enabled, splits, options)
        for name, factor in zip(_FACTORS, factors, strict=True):
            expected = getattr(layer, name).shape
            if factor.shape != expected:
                raise ValueError(
                    f"{adapt.join(path, name)}: shape must be {list(expected)} in "
                    f"{type(layer).__name__}({layer.extra_repr()}), got {list(factor.shape)}"
                )
            setattr(layer, name, nn.Parameter(factor))
        layers[path] = layer
    return layers


def _factors(path: str, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A [E·r, in] and lora_B [rows, r] of the layer at path."""
    weight = state.get(adapt.join(path, "weight"))
    if any(adapt.join(path, f"conv.{name}") in state for name in ("weight", "bias")) or (
        weight is not None and weight.dim() > 2
    ):
        raise ValueError(
            f"{path}: a convolution; PEFT's shapes depend on kernel and channels, which are not "
            f"in its factors: load the file into the model and call lora_kernels.save_adapter"
        )
    for name in _FACTORS:
        key = adapt.join(path, name)
        if key not in state:
            raise ValueError(f"{key}: missing")
        factor = state[key]
        if factor.dim() != 2 or not factor.is_floating_point() or 0 in factor.shape:
            raise ValueError(
                f"{key}: must be a floating-point matrix, got {factor.dtype} {list(factor.shape)}"
            )
    a, b = (state[adapt.join(path, name)] for name in _FACTORS)
    if a.shape[0] % b.shape[1]:
        raise ValueError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have no rank in common"
        )
    return a, b


def _layer(
    path: str, a: Tensor, b: Tensor, is_embedding: bool, enabled: "_Numbers", splits: "_Numbers",
    options: argparse.Namespace,
) -> LoRALayer:  # fmt: skip
    """The layer that factors of these shapes belong to."""
    r, groups = b.shape[1], a.shape[0] // b.shape[1]
    if is_embedding:
        return LoRAEmbedding(a.shape[1], b.shape[0], r, options.lora_alpha, device="meta")
    common = {
        "r": r, "lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout,
        "fan_in_fan_out": options.fan_in_fan_out, "bias": False, "device": "meta",
    }  # fmt: skip
    # Factors of one enabled group look like a Linear's: only an option with a name tells.
    flags = enabled.of(path) if groups > 1 else enabled.by_path.get(path)
    if flags is None and groups == 1:
        return LoRALinear(a.shape[1], b.shape[0], **common)
    if flags is None:
        raise ValueError(
            f"{path}: a MergedLinear with {groups} enabled groups, and which ones is not in the "
            f"file: give --enable-lora"
        )
    if set(flags) - {0, 1} or sum(flags) != groups:
        raise ValueError(f"{path}: --enable-lora must enable {groups} groups, got {flags}")
    sizes = splits.of(path) or [b.shape[0] // groups] * len(flags)
    flags = [flag == 1 for flag in flags]
    return LoRAMergedLinear(
        a.shape[1], sum(sizes), enable_lora=flags, out_splits=sizes, **common
    )  # fmt: skip


def _add_others(
    model: nn.Module,
    state: dict[str, Tensor],
    layers: Collection[str],
    modules_to_save: Sequence[str],
) -> tuple[str, list[str]]:
    """Puts biases and modules trained as a whole into model; what the adapter is to call them."""
    others = [key for key in state if _split(key)[1] not in _FACTORS]
    parents = {key[:i] for key in others for i, letter in enumerate(key) if letter == "."}
    saved = _matches("--modules-to-save", modules_to_save, parents)
    bias = "none"
    for key in others:
        path, name = _split(key)
        if not adapt.is_inside(path, saved):
            if not adapt.is_bias(name):
                raise ValueError(
                    f"{key}: neither a factor of LoRA nor a bias: give --modules-to-save where it "
                    f"was trained, else save lora_state_dict(model)"
                )
            bias = "lora_only" if path in layers and bias != "all" else "all"
        value = state[key]
        if value.is_floating_point():
            _owner(model, key).register_parameter(name, nn.Parameter(value))
        else:
            _owner(model, key).register_buffer(name, value)
    return bias, sorted(saved)


class _Numbers:
    """The values of an option [NAME=]N,N,... for modules, by their paths."""

    def __init__(self, option: str, values: Sequence[str], paths: Collection[str]):
        self.by_path: dict[str, list[int]] = {}
        self.of_all: list[int] | None = None
        for value in values:
            name, _, numbers = value.rpartition("=")
            try:
                numbers = [int(number) for number in numbers.split(",")]
            except ValueError:
                raise ValueError(f"{option}: must be [NAME=]N,N,..., got {value!r}") from None
            if name:
                self.by_path |= dict.fromkeys(_matches(option, [name], paths), numbers)
            else:
                self.of_all = numbers

    def of(self, path: str) -> list[int] | None:
        return self.by_path.get(path, self.of_all)


def _matches(option: str, names: Sequence[str], paths: Collection[str]) -> set[str]:
    """The paths that are, or end with, one of names; every name means one at least."""
    matches = set()
    for name in names:
        found = {path for path in paths if adapt.is_named(path, [name])}
        if not found:
            raise ValueError(f"{option}: no module in the file is called {name!r}")
        matches |= found
    return matches


def _owner(model: nn.Module, key: str) -> nn.Module:
    """The module that holds what key names; modules on the way to it are made."""
    module = model
    for part in _split(key)[0].split(".") if "." in key else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    return module


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.rpartition(".")
    return path, name
