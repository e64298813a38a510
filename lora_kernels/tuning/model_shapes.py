"""The layers of a model, from its configuration alone: no weight is read."""

from pathlib import Path

import torch
from torch import nn

from lora_kernels.adapters.hub import is_name
from lora_kernels.foreign import ForeignModule
from lora_kernels.tuning.shapes import SETS, Layer

__all__ = ["layers_of", "parse_shapes", "without_weights"]


def layers_of(model: str) -> tuple[Layer, ...]:
    """[K, N] of the linears of a Transformers model that LoRA usually adapts, each once.

    model: as of without_weights. Raises: ValueError, in one line, if no model can be made of it.
    """
    try:
        made = without_weights(model)
    except ImportError:
        raise ValueError(
            f"{model}: needs transformers (pip install transformers); or give --shapes KxN,..."
        ) from None
    found = dict.fromkeys(shape for shape in map(_shape, made.modules()) if shape is not None)
    if not found:
        raise ValueError(f"{model}: has no linear layers; give --shapes KxN,...")
    return tuple(found)


def without_weights(model: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A Transformers model on the meta device, without its output layer.

    model: a folder with config.json, that file, or OWNER/NAME on the Hugging Face Hub. dtype: that
    of the weights; None for that of the configuration.
    Raises: ValueError, in one line, if no model can be made of it; ImportError.
    """
    path = Path(model)
    named = is_name(model) and path.name != "config.json"
    if not (named or path.exists()):  # Transformers would ask the Hub for it
        raise ValueError(f"{model}: no such file or directory; a name on the Hub is OWNER/NAME")
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(path.parent if path.name == "config.json" else model)
        with torch.device("meta"):
            made = AutoModel.from_config(config)
    except Exception as error:  # whatever the files hold
        raise ValueError(f"{model}: {' '.join(str(error).split())}") from error
    return made.to(dtype or made.dtype)


def _shape(module: ForeignModule) -> Layer | None:
    if isinstance(module, nn.Linear):
        return Layer(module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D":  # Transformers' own, which stores [K, N]
        return Layer(*module.weight.shape)
    return None


def parse_shapes(text: str) -> tuple[Layer, ...]:
    """Layers out of a list such as "4096x4096,4096x1024,llama3-8b", K x N each, or sets by name.

    Merged layers of a set are left out. Raises: ValueError that names the part.
    """
    found = []
    for part in text.split(","):
        if part in SETS:
            found += [layer for layer in SETS[part] if len(layer.enable_lora) == 1]
            continue
        try:
            k, n = map(int, part.lower().split("x"))
            if k <= 0 or n <= 0:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{part!r} must be KxN, such as 4096x1024, or one of {', '.join(SETS)}"
            ) from None
        found.append(Layer(k, n))
    return tuple(dict.fromkeys(found))
