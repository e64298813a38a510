"""What load_adapter says of a file that does not tell all: the way out, in Python's terms."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lora_kernels.adapters import files
from lora_kernels.adapters.formats.adapter import FACTORS
from lora_kernels.adapters.untold import ALPHA, Untold
from lora_kernels.model.paths import adapted_layers, split

__all__ = ["in_python"]

# Scripts keep a state dict under these keys in a larger one.
_ENVELOPES = ("model_state_dict", "state_dict", "model")


def in_python(error: Untold, model: nn.Module, file: Path, lora_alpha: float | None) -> str:
    """error of a format's reader for load_adapter, which was given lora_alpha.

    If model has the LoRA layers of which file holds the factors, it says how to load these.
    """
    loading = _loading(model, file)
    if loading is not None:
        return f"{error.what}; the model has the LoRA layers of this file: {loading} loads it"
    if not error.options:
        return error.what
    if error.options == (ALPHA,):
        return f"{error.what}: give lora_alpha="
    given = () if lora_alpha is None else (f"--lora-alpha {lora_alpha:.15g}",)
    options = " ".join((*given, *error.options))
    return (
        f"{error.what}: load_adapter has no argument for it: `lora-kernels convert "
        f"{file} DIRECTORY {options}` makes a directory that it takes"
    )


def _loading(model: nn.Module, file: Path) -> str | None:
    """The call that loads a state dict into a model that has its LoRA layers; None if not so."""
    if not adapted_layers(model) or files.is_safetensors(file):
        return None
    try:
        state = files.read_pickle(file)
    except (ValueError, OSError):
        return None
    loaded = f"torch.load({str(file)!r})"
    for name in _ENVELOPES:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state, loaded = state[name], f"{loaded}[{name!r}]"
    factors = {key for key in state if split(key)[1] in FACTORS}
    if not factors or not factors <= set(model.state_dict()):
        return None
    return f"model.load_state_dict({loaded}, strict=False)"
