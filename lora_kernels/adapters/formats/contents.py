"""What lies at a path, seen from outside: enough to tell the format of an adapter."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from lora_kernels.adapters import files, mapped

__all__ = ["CONFIG", "DOWNLOADED", "Contents", "below", "candidates", "look", "sibling_config"]

CONFIG = "adapter_config.json"  # PEFT, MLX and AdapterHub call it so

# What tools call the file of weights in a directory, as patterns.
_NAMES = (
    "adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt", "adapters.safetensors",
    "adapter_[0-9]*.pt", "pytorch_lora_weights.safetensors", "lit_model.pth.lora",
    "pytorch_adapter.bin", "adapter.safetensors",
)  # fmt: skip
# What a download takes of a repository: those, and the files that say what is in them.
DOWNLOADED = (CONFIG, "hyperparameters.yaml", "model_config.yaml", *_NAMES)
_ENDINGS = ("*.gguf", "*.safetensors", "*.pt")
# What training scripts keep beside the weights.
_OF_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*")
# Where adapter_callback and PEFT put adapters in a folder.
_BELOW = ("*", "*/*")

Kind = Literal["directory", "safetensors", "gguf", "pickle"]


@dataclass(frozen=True)
class Contents:
    """One file of weights, or a directory without any.

    keys, metadata: of safetensors and pickles, as far as they can be read. config: what
    adapter_config.json beside it holds.
    """

    path: Path
    kind: Kind
    keys: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)

    def has(self, *endings: str) -> bool:
        """Whether a key ends with one of endings."""
        return any(key.endswith(endings) for key in self.keys)


def candidates(path: Path) -> list[Path]:
    """The files at path that may be an adapter's weights: path itself, or those in a directory."""
    if not path.is_dir():
        return [path]
    named = _matches(path, _NAMES)
    if path / _NAMES[0] in named:  # PEFT's pickle beside it is the same adapter
        named = [file for file in named if file.name != _NAMES[1]]
    others = set(_matches(path, _OF_TRAINING))
    return named or [file for file in _matches(path, _ENDINGS) if file not in others]


def below(path: Path) -> list[Path]:
    """The directories in path, and in those, that hold files that adapters are called by."""
    folders = (folder for pattern in _BELOW for folder in path.glob(f"{pattern}/"))
    return sorted(folder for folder in folders if _matches(folder, _NAMES))


def _matches(directory: Path, patterns: Iterable[str]) -> list[Path]:
    found = (file for pattern in patterns for file in directory.glob(pattern))
    return sorted(file for file in found if file.is_file())


def look(path: Path) -> Contents:
    """The contents of a file, or a directory that has no candidates.

    Raises: OSError; ValueError for a pipe or a device, which may have no end.
    """
    if path.is_dir():
        return Contents(path, "directory")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be a file or a directory")
    config = sibling_config(path)
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        return Contents(path, "gguf", config=config)
    if files.is_safetensors(path):
        with contextlib.suppress(Exception):  # its reader says what is wrong
            tensors, metadata = mapped.map_safetensors(path)
            return Contents(path, "safetensors", tuple(tensors), metadata, config)
        return Contents(path, "safetensors", config=config)
    return Contents(path, "pickle", _keys_of_pickle(path), config=config)


def _keys_of_pickle(path: Path) -> tuple[str, ...]:
    try:
        state = files.read_pickle(path)
    except (ValueError, OSError):
        return ()
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict):
        return ()
    return tuple(k for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor))


def sibling_config(path: Path) -> dict:
    """What adapter_config.json beside the file at path holds; empty if it is not to be read."""
    config = path.parent / CONFIG
    with contextlib.suppress(ValueError, OSError):
        raw = files.read_json(config)
        return raw if isinstance(raw, dict) else {}
    return {}
