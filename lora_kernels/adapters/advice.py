"""What load_adapter says of a file that does not tell all: the way out, in Python's terms."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lora_kernels.adapters import files
from lora_kernels.adapters.formats.adapter import FACTORS
from lora_kernels.model.paths import adapted_layers, split

__all__ = ["in_python"]

_ALPHA = re.compile(r"--lora-alpha(?: ([-+\w.]*\d[-+\w.]*)|(:)|)")
_OPTION = re.compile(r"--[a-z]+(?:-[a-z]+)*")
# Scripts keep a state dict under these keys in a larger one.
_ENVELOPES = ("model_state_dict", "state_dict", "model")


def in_python(message: str, model: nn.Module, file: Path) -> str:
    """message of a format's reader, which names options of lora-kernels convert, for load_adapter.

    If model has the LoRA layers of which file holds the factors, it says how to load these.
    """
    if not _OPTION.search(message):
        return message
    message = _ALPHA.sub(_as_keyword, message)
    loading = _loading(model, file)
    if loading is not None:
        return f"{message}; the model has the LoRA layers of this file: {loading} loads it"
    others = sorted(set(_OPTION.findall(message)))
    if others:
        message += (
            f"; load_adapter has no such argument: `lora-kernels convert {file} DIRECTORY` with "
            f"{' or '.join(others)} makes a directory that it takes"
        )
    return message


def _as_keyword(found: re.Match) -> str:
    value, colon = found.groups()
    return f"lora_alpha{colon}" if colon else f"lora_alpha={value or ''}"


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
