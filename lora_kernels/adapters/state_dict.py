"""State dicts of a model with LoRA: loralib's, the merged plain model's, and an adapter's part."""

import warnings
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from lora_kernels.foreign import check_no_peft
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.multi_linear import MultiLoRALinear
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.model.other_layers import INSTEAD, other_lora_layers
from lora_kernels.model.paths import (
    as_names,
    is_inside,
    join,
    lora_layers,
    named_modules,
    plain_state,
    split,
    wrapper_prefix,
)
from lora_kernels.model.route import one_adapter
from lora_kernels.model.ties import parted_ties
from lora_kernels.model.trainable import Bias, bias_names, check_bias, saved_paths

__all__ = ["entry_keys", "lora_state_dict", "merged_state_dict"]


def lora_state_dict(
    model: nn.Module, bias: Bias = "none", modules_to_save: str | Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The entries of model.state_dict() that LoRA trains, under loralib's keys, unmerged.

    Wrappers inside model, such as compiled blocks, leave no trace in the keys: they load into the
    plain model, and into one with wrappers that mark_only_lora_as_trainable has seen. What wraps
    the whole model (DDP, torch.compile) gives its prefix to every key, as in model.state_dict().
    Keys whose last part starts with "lora_"; biases as in mark_only_lora_as_trainable; the whole
    of each module in modules_to_save and of those recorded by mark_only_lora_as_trainable. As in
    model.state_dict(), parameters that fully_shard has sharded are DTensors: ``full_tensor()``, on
    every rank, gathers one.
    Warns: if there are none.
    Raises: NotImplementedError for another bias; ValueError for a name that no module has, and for
    a model with adapters of PEFT.
    Source: loralib's function, which also looks at names in the middle of a path.
    """
    check_bias(bias)
    check_no_peft(
        "lora_state_dict", model, "peft.get_peft_model_state_dict(model) returns their entries"
    )
    saved = saved_paths(model, as_names("modules_to_save", modules_to_save, model))
    wanted = _bias_keys(model, bias)
    prefix = wrapper_prefix(model)
    found = {
        prefix + key: value
        for key, value in plain_state(model).items()
        if key in wanted or split(key)[1].startswith("lora_") or is_inside(key, saved)
    }
    if not found:
        warnings.warn(
            "lora_state_dict: model has no LoRA parameter, so the dict is empty",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _bias_keys(model: nn.Module, bias: str) -> set[str]:
    """Keys in plain_state(model) of the biases that mark_only_lora_as_trainable(bias) trains."""
    owners = set()
    if bias == "all":
        owners = {id(module) for module in model.modules()}
    elif bias == "lora_only":
        owners = {id(layer.weight_owner()) for _, layer in lora_layers(model)}
    return {
        join(path, name)
        for path, module in named_modules(model, remove_duplicate=False)
        if id(module) in owners
        for name in bias_names(module)
    }


def merged_state_dict(model: nn.Module, *, adapter: str | None = None) -> dict[str, Tensor]:
    """The state dict of the model without LoRA: same keys, each weight with its delta folded in.

    Loads strictly into the original architecture and gives the outputs of model in eval mode.
    Quantised weights that LoRA changes become dense; so do not load it into a quantised model.
    Weights that LoRA changes are copies, the rest is shared with model as in state_dict().
    Warns: of a tied weight with LoRA on one side, or another LoRA on each: its entries differ, so
    load the dict into an untied model. Of LoRA layers that are not of this package (loralib's, a
    user's own), and those of a user's own class that do not tell their base weight or their update:
    their entries stay as they are. Of a model without LoRA layers.
    Parameters that fully_shard has sharded are DTensors. Every rank has to call this then.
    adapter: which of the adapters of a model with several.
    Raises: ValueError for a model with adapters of PEFT, for a name that no adapter has, for an
    embedding with max_norm, which would
    limit the merged rows anew, and for weights that FSDP (not fully_shard) has sharded.
    """
    check_no_peft(
        "merged_state_dict", model, "model.merge_and_unload().state_dict() is the merged model's"
    )
    one_adapter("merged_state_dict", model, adapter)  # raises
    renamed: dict[str, str] = {}
    dropped: set[str] = set()
    merged: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    copies: dict[int | tuple[int, str], Tensor] = {}
    state = plain_state(model)  # first, because this makes FSDP shard its parameters again
    for path, layer in named_modules(model, remove_duplicate=False):
        if not isinstance(layer, LoRALayer):
            continue
        held = id(layer)
        if isinstance(layer, MultiLoRALinear):
            dropped |= {join(path, name) for name in layer.factor_names}
            layer = layer.alone(adapter) if adapter in layer.adapters else layer
        if isinstance(layer, ConvLoRA):
            renamed |= {join(path, f"conv.{name}"): join(path, name) for name in ("weight", "bias")}
        if isinstance(layer, LoRAQuantizedLinear):
            inside = join(path, "base_layer")
            dropped |= {key for key in state if is_inside(key, [inside])} - {join(inside, "bias")}
            dropped |= {join(path, name) for name in layer.factor_names}
            renamed[join(inside, "bias")] = join(path, "bias")
            if held not in copies:
                copies[held] = layer.merged_weight()
            added[join(path, "weight")] = copies[held]
        elif isinstance(layer, LoRAExperts):
            for name in layer.target_parameters:
                if (id(layer), name) not in copies:
                    copies[id(layer), name] = layer.merged_stack(name)
                merged[join(path, name)] = copies[id(layer), name]
            dropped |= {join(path, name) for name in layer.factor_names}
        elif layer.has_lora and (
            not layer.has_base_weight or type(layer).delta_weight is LoRALayer.delta_weight
        ):
            left[path] = type(layer).__name__
        elif layer.has_lora:
            if getattr(layer, "max_norm", None) is not None:
                raise ValueError(f"{path}: an embedding with max_norm cannot be merged for good")
            base = join(path, layer.weight_name)
            if layer.base_weight().shape != state.get(base, layer.base_weight()).shape:
                raise ValueError(
                    f"{base}: FSDP has sharded it: call merged_state_dict in "
                    f"FullyShardedDataParallel.summon_full_params(model)"
                )
            if held not in copies:
                copies[held] = layer.merged_weight()
            merged[base] = copies[held]
            dropped |= {join(path, name) for name in layer.factor_names}
    everywhere = named_modules(model, remove_duplicate=False)
    parted = parted_ties("merged_state_dict", everywhere, state, merged, renamed)
    if parted is not None:
        warnings.warn(parted, stacklevel=2)
    others = other_lora_layers(model)
    if others is not None:
        warnings.warn(
            f"merged_state_dict: these LoRA layers are not of this package, and their entries stay "
            f"as they are, lora_A and lora_B among them: {others}. {INSTEAD}, or merge "
            f"them by their own functions, as loralib's by eval()",
            stacklevel=2,
        )
    elif not any(True for _ in lora_layers(model)):
        warnings.warn(
            "merged_state_dict: model has no LoRA layer, so the dict is that of state_dict()",
            RuntimeWarning,
            stacklevel=2,
        )
    if left:
        warnings.warn(
            "merged_state_dict: the entries of these layers stay as they are, lora_A and lora_B "
            "among them, because their classes define no base weight or no delta_weight(): "
            + ", ".join(f"{path} ({kind})" for path, kind in left.items()),
            stacklevel=2,
        )
    return {
        renamed.get(key, key): merged.get(key, value)
        for key, value in state.items()
        if key not in dropped
    } | added


def entry_keys(
    model: nn.Module, targets: Mapping[str, nn.Module], bias: str, saved: Collection[str]
) -> dict[str, str]:
    """Key in the plain model -> key in plain_state(model), of what trains besides the factors.

    targets: the modules that have LoRA or are to get it. saved: the paths of the modules that train
    as a whole.
    """
    keys = {key: key for key in plain_state(model) if is_inside(key, saved)}
    for path, module in named_modules(model):
        if bias == "none" or is_inside(path, saved):
            continue
        parent = split(path)[0]
        plain = parent if isinstance(targets.get(parent), (ConvLoRA, LoRAQuantizedLinear)) else path
        if bias == "all" or plain in targets:
            keys |= {join(plain, name): join(path, name) for name in bias_names(module)}
    return keys
