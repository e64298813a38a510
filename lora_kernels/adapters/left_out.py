"""What merged_state_dict and save_adapter warn of: what is left out."""

from collections.abc import Collection

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.paths import first_few, is_inside, join, lora_layers, named_modules

__all__ = ["other_lora_layers", "trained_beside"]


def other_lora_layers(model: nn.Module, saved: Collection[str] = ()) -> str | None:
    """The first LoRA layers of model that are not of this package, with their classes; or None.

    They are loralib's, and a user's own: modules that hold lora_A, lora_B and the weight themselves
    or in a child. Those in the modules at the paths saved are left out.
    """
    found: dict[type, list[str]] = {}
    for path, module in named_modules(model):
        if _is_other_lora(module) and not is_inside(path, saved):
            found.setdefault(type(module), []).append(path)
    listed = (
        f"{first_few(paths)} ({kind.__module__}.{kind.__qualname__})"
        for kind, paths in found.items()
    )
    return ", ".join(listed) or None


def _is_other_lora(module: nn.Module) -> bool:
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


def trained_beside(model: nn.Module, written: Collection[str], saved: Collection[str]) -> list[str]:
    """Keys of parameters that train and are neither written nor factors of a LoRA layer.

    written: keys, as this function has them. saved: the paths of the modules that are written as a
    whole. A parameter that is tied to a written one is written, too, and one that parametrizes a
    factor is one.
    """
    names: dict[int, str] = {}
    known: set[int] = set()
    whole = [*saved] + [
        join(path, f"parametrizations.{factor}")
        for path, layer in lora_layers(model)
        for factor in layer.factor_names
        if is_parametrized(layer, factor)
    ]
    for path, module in named_modules(model, remove_duplicate=False):
        factors = module.factor_names if isinstance(module, LoRALayer) else ()
        if _is_other_lora(module):
            factors = ("lora_A", "lora_B")
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
                continue
            key = join(path, name)
            if name in factors or key in written or is_inside(key, whole):
                known.add(id(parameter))
            else:
                names.setdefault(id(parameter), key)
    return [name for held, name in names.items() if held not in known]
