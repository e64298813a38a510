"""LoRA layers that are not of this package: loralib's, and a user's own."""

from collections.abc import Collection

from torch import nn

from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.paths import first_few, is_inside, named_modules

__all__ = ["INSTEAD", "is_other_lora", "other_lora_layers"]

INSTEAD = "Import lora_kernels in the place of loralib"  # the way out, which may go on


def other_lora_layers(model: nn.Module, saved: Collection[str] = ()) -> str | None:
    """The first LoRA layers of model that are not of this package, with their classes; or None.

    They are loralib's, and a user's own: modules that hold lora_A, lora_B and the weight themselves
    or in a child. Those in the modules at the paths saved are left out.
    """
    found: dict[type, list[str]] = {}
    for path, module in named_modules(model):
        if is_other_lora(module) and not is_inside(path, saved):
            found.setdefault(type(module), []).append(path)
    listed = (
        f"{first_few(paths)} ({kind.__module__}.{kind.__qualname__})"
        for kind, paths in found.items()
    )
    return ", ".join(listed) or None


def is_other_lora(module: nn.Module) -> bool:
    """Whether module is a LoRA layer by what it holds, and not of this package."""
    if isinstance(module, (LoRALayer, nn.ParameterDict)):
        return False
    own = module._parameters
    a, b = own.get("lora_A"), own.get("lora_B")
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return False
    if own.get("weight") is not None:
        return True
    sizes = {b.shape[0] * a.shape[-1], a.shape[0] * b.shape[-1]}  # of the update, either way round
    inside = (
        child._parameters.get("weight")
        for child in module.children()
        if not isinstance(child, LoRALayer)
    )
    return any(weight is not None and weight.numel() in sizes for weight in inside)
