"""Putting LoRA layers in the places of the modules that they wrap."""

from collections.abc import Mapping

from torch import nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.paths import lora_layers

__all__ = ["keep_hooks", "replace_modules"]


def replace_modules(model: nn.Module, layers: Mapping[int, LoRALayer]) -> None:
    """Puts layers in the places of the modules with these ids."""
    parents: list[ForeignModule] = list(model.modules())
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if id(child) in layers:
                setattr(parent, name, layers[id(child)])
                if name == "_orig_mod":  # torch.compile holds the call of the module before
                    parent._initialize()
    for module in model.modules():
        # PyTorch's fast path for inference of these reads the weights without calling the layers.
        if isinstance(module, nn.TransformerEncoderLayer) and any(lora_layers(module)):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(lora_layers(module)):
            module.use_nested_tensor = False


def keep_hooks(module: nn.Module, layer: LoRALayer) -> None:
    """Gives layer the forward and backward hooks of the module that it wraps."""
    for name, hooks in vars(module).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward")):
            setattr(layer, name, hooks)
