"""A whole model with merged weights, and back; state dicts with merged weights, as loralib's."""

import warnings

from torch import Tensor, nn

from lora_kernels.foreign import Model, check_model, check_no_peft
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.merged_state_dict import use_merged_state_dict
from lora_kernels.model.paths import adapted_layers, join, lora_layers
from lora_kernels.model.route import adapter_names
from lora_kernels.model.ties import parted_ties

__all__ = ["merge_lora", "unmerge_lora", "use_merged_state_dicts"]


def merge_lora(model: Model) -> Model:
    """Puts model into eval mode, in which all of its LoRA layers use merged weights; returns model.

    It sets ``merge_weights`` of every layer: ``train()`` takes the layers back to their adapters,
    and the next ``eval()`` merges them again. What was merged already stays as it is. See LoRALayer
    for what merging means: no parameter changes, and each layer takes memory for one more copy of
    its weight. A layer that cannot be merged (sharded, on the meta device, with a forward of its
    own, ...) goes on computing its update on the fly. A warning names it, with the reason.
    Raises: ValueError if model has no LoRA layer.
    """
    for layer in _layers(model, "merge_lora"):
        layer.merge_weights = True
    model.eval()
    obstacles = [
        f"{path} ({reason})"
        for path, layer in adapted_layers(model).items()
        if not layer.merged and (reason := layer.merging_obstacle()) is not None
    ]
    if obstacles:
        warnings.warn(
            f"merge_lora: these layers compute their update on the fly: {', '.join(obstacles)}",
            stacklevel=2,
        )
    return model


def unmerge_lora(model: Model) -> Model:
    """Makes all LoRA layers of model compute their update on the fly in eval mode; returns model.

    It unsets ``merge_weights`` of every layer and frees the merged weights. The mode stays.
    Raises: ValueError if model has no LoRA layer.
    """
    for layer in _layers(model, "unmerge_lora"):
        layer.merge_weights = False
        layer._unmerge()
    return model


def use_merged_state_dicts(model: Model, enabled: bool = True) -> Model:
    """State dicts of model as loralib's: merged weights while layers are merged; returns model.

    For scripts that rely on what loralib does in eval mode. While a layer is merged,

    * ``state_dict()`` gives its merged weight, a copy, so that the dict loads into the plain
      network with the same outputs (``lora_A`` and ``lora_B`` are in it as well);
    * ``load_state_dict()`` takes the weight as merged: the base weight becomes the loaded weight
      minus the update of the loaded factors, rounded to its dtype.

    A layer that is not merged, as in train mode, gives and takes its base weight. So a dict has to
    be loaded in the mode in which it was saved. ``parameters()`` are the base weights as ever.
    With enabled=False state dicts hold base weights again. ``merged_state_dict(model)`` gives the
    plain network's state dict in any mode, without this.
    ``state_dict()`` warns of a tied weight with LoRA on one side, or another LoRA on each: its
    entries differ, so load the dict into an untied network.
    Raises: ValueError if model has no LoRA layer, or one with use_dora: its base weight cannot be
    told from its merged one.
    """
    layers = _layers(model, "use_merged_state_dicts")
    for path, layer in adapted_layers(model).items():
        if layer.use_dora:
            raise ValueError(
                f"use_merged_state_dicts: {path} has use_dora=True, and no base weight can be made "
                f"of its merged one: save merged_state_dict(model), or the adapter by itself"
            )
    for layer in layers:
        use_merged_state_dict(layer, enabled)
    _warn_of_ties(model, enabled)
    return model


def _warn_of_ties(model: nn.Module, enabled: bool) -> None:
    """While it is enabled, state_dict() of model warns of tied weights that come apart in it."""
    hook = model.__dict__.pop("_parted_ties_hook", None)
    if hook is not None:
        hook.remove()
    if enabled:
        model.__dict__["_parted_ties_hook"] = model.register_state_dict_post_hook(_notice_ties)


def _notice_ties(model: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    modules = [*model.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False)]
    keys = (
        join(path, layer.weight_name)
        for path, layer in modules
        if isinstance(layer, LoRALayer) and layer.merged and layer.has_lora
    )
    merged = {key: state[key] for key in keys if key in state}
    parted = parted_ties("state_dict", modules, state, merged, {})
    if parted is not None:
        warnings.warn(parted, stacklevel=2)


def _layers(model: nn.Module, function: str) -> list[LoRALayer]:
    check_model(function, model)
    layers = [layer for _, layer in lora_layers(model)]
    names = adapter_names(model)
    if names:
        raise ValueError(
            f"{function}: the model has several adapters, {', '.join(map(repr, names))}, and one "
            f"weight for all: merged_state_dict(model, adapter=...) merges one of them"
        )
    if not layers:
        check_no_peft(function, model, "its merge_adapter() and unmerge_adapter() merge them")
        raise ValueError(f"{function}: {type(model).__name__} has no LoRA layer of lora_kernels")
    return layers
