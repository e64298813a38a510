"""State dicts with merged weights, which loralib saves in eval mode: giving them and taking them.

A layer's own state dict holds the base weight in both modes. Whether a file holds a base weight or
a merged one is not written in it, so the layer compares: with its own base weight, and with what
the update in the file would make of that.
"""

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.layers.merging import MergesOnEval, undisturbed

__all__ = ["STATE_DICT_VERSION", "notice_merged_weight", "use_merged_state_dict"]

# nn.Module's _version of a LoRA layer, which PyTorch writes into a state dict: the weight in it is
# the base weight. loralib's layers have version 1.
STATE_DICT_VERSION = 2
_latest = threading.local()  # load: the one that has warned last; said: of what


def use_merged_state_dict(layer: MergesOnEval, enabled: bool) -> None:
    """While layer is merged, its entries in state dicts hold the merged weight; or no longer."""
    for handle in layer.__dict__.pop("_merged_state_dict_hooks", ()):
        handle.remove()
    if enabled:
        layer.__dict__["_merged_state_dict_hooks"] = (
            layer.register_state_dict_post_hook(_give_merged_weight),
            layer.register_load_state_dict_pre_hook(_take_merged_weight),
        )


def _give_merged_weight(layer, state_dict: dict[str, Tensor], prefix: str, local_metadata) -> None:
    key = prefix + layer.weight_name
    if layer.merged and layer.has_lora and key in state_dict:
        state_dict[key] = layer.merged_weight()
        local_metadata.pop("version", None)


def _take_merged_weight(layer, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    if not (layer.merged and layer.has_lora):
        return
    entries = _entries(layer, state_dict, prefix)
    if entries is not None:
        weight, *factors = entries
        with undisturbed(weight):
            base = weight.detach() - _delta(layer, factors).to(weight.device)
            state_dict[prefix + layer.weight_name] = base.to(weight.dtype)


def notice_merged_weight(
    layer, state_dict: dict[str, Tensor], prefix: str, local_metadata: Mapping, load: list[str]
) -> None:
    """Before a load: a merged weight beside its factors does not become a base weight unsaid.

    If the weight is the layer's base weight with the update of the factors in it, the base weight
    stays, and a warning says so. If the layer is merged, and nothing tells what the weight is, a
    warning asks. A load of a whole model gives each of them once, with the first layer's key; load:
    the list of missing keys that PyTorch hands to all layers in it.
    """
    if not (layer.has_lora and prefix + "lora_A" in state_dict and prefix + "lora_B" in state_dict):
        return
    if local_metadata.get("version", 0) >= STATE_DICT_VERSION:
        return
    if layer.merged and "_merged_state_dict_hooks" in layer.__dict__:
        return
    entries = _entries(layer, state_dict, prefix)
    if entries is None:
        return
    base, key = layer.base_weight(), prefix + layer.weight_name
    with undisturbed(base):
        weight, *factors = (entry.detach().to(base.device) for entry in entries)
        if torch.equal(weight.to(base.dtype), base):
            return
        delta = _delta(layer, factors)
        wide = weight.to(delta.dtype)
        off, size, of_weight = (
            torch.linalg.vector_norm(tensor)
            for tensor in (wide - base.to(delta.dtype) - delta, delta, wide)
        )
    # Whoever merged has rounded the sum to the weight's dtype, and the update to the factors'.
    of_sum = max(torch.finfo(tensor.dtype).eps for tensor in (weight, base))
    of_delta = max(torch.finfo(tensor.dtype).eps for tensor in factors)
    if off <= 0.35 * of_sum * of_weight + 4 * of_delta * size and off < size / 2:
        state_dict[key] = base.detach()
        _warn_once(
            load,
            key,
            "load_state_dict: weights of this state dict have the update of its lora_A and lora_B "
            "in them, as loralib saves them in eval mode. The model keeps its base weights, which "
            "are the same without it.",
        )
    elif layer.merged and size > 0 and not layer.use_dora:
        _warn_once(
            load,
            key,
            "load_state_dict: the model is in eval mode with merged weights, and the state dict "
            "does not say whether its weights have the update in them. They are taken as base "
            "weights. If loralib saved them in eval mode, call "
            "lora_kernels.use_merged_state_dicts(model) before you load them.",
        )


def _warn_once(load: list[str], key: str, text: str) -> None:
    """Warns, unless this load has said the same of another layer."""
    if getattr(_latest, "load", None) is not load:
        _latest.load, _latest.said = load, set()
    if text not in _latest.said:
        _latest.said.add(text)
        warnings.warn(f"{text} The first of them is {key}.", stacklevel=3)


def _entries(layer, state_dict: Mapping[str, Tensor], prefix: str) -> list[Tensor] | None:
    """weight and factors of a state dict, or the layer's own factors if it has none.

    None if there is no weight, or if one of them is not plain and whole or does not fit.
    """
    if prefix + layer.weight_name not in state_dict:
        return None
    own = {name: getattr(layer, name) for name in layer.factor_names}
    own = {layer.weight_name: layer.base_weight(), **own}
    entries = [state_dict.get(prefix + name, tensor) for name, tensor in own.items()]
    fit = all(
        entry.shape == tensor.shape and _is_plain(entry) and _is_plain(tensor)
        for entry, tensor in zip(entries, own.values(), strict=True)
    )
    return entries if fit else None


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor) in (Tensor, nn.Parameter)
    return kind and tensor.is_floating_point() and not tensor.is_meta


def _delta(layer, factors: Sequence[Tensor]) -> Tensor:
    """layer.delta_weight() if these were its factors."""
    other = copy.copy(layer)
    own = dict(zip(layer.factor_names, factors, strict=True))
    other._parameters = {**layer._parameters, **own}
    return other.delta_weight()
