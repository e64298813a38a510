"""What save_adapter warns of: parameters that train and are left out."""

from collections.abc import Collection

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.other_layers import is_other_lora
from lora_kernels.model.paths import is_inside, join, lora_layers, named_modules

__all__ = ["trained_beside"]


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
        if is_other_lora(module):
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
