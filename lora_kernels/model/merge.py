"""merge_lora and unmerge_lora: a whole model with merged weights, and back."""

import warnings

from torch import nn

from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.paths import adapted_layers, lora_layers

__all__ = ["merge_lora", "unmerge_lora"]


def merge_lora(model: nn.Module) -> nn.Module:
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


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Makes all LoRA layers of model compute their update on the fly in eval mode; returns model.

    It unsets ``merge_weights`` of every layer and frees the merged weights. The mode stays.
    Raises: ValueError if model has no LoRA layer.
    """
    for layer in _layers(model, "unmerge_lora"):
        layer.merge_weights = False
        layer._unmerge()
    return model


def _layers(model: nn.Module, function: str) -> list[LoRALayer]:
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError(
            f"{function}: {type(model).__name__} has no LoRA layer of lora_kernels; PEFT's models "
            "have merge_adapter() and unmerge_adapter()"
        )
    return layers
