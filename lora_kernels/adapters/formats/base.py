"""What a file of an adapter leaves to its base model: heads, architecture, paths of modules."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels.adapters import files
from lora_kernels.adapters.files import naming
from lora_kernels.model.paths import named_modules, split, unwrapped

__all__ = ["UNKNOWN", "Base"]

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_EMBEDDINGS, _HEAD = ("embed_tokens", "wte"), "lm_head"


@dataclass(frozen=True)
class Base:
    """What is known of a base model, in Hugging Face's words; None for what is not known.

    place: where it is from, for errors. paths: of its modules that have parameters.
    """

    place: str
    model_type: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    paths: Collection[str] | None = None

    @classmethod
    def read(cls, path: Path) -> "Base":
        """Of a directory with config.json, with or without weights, or of that file.

        Raises: FileNotFoundError; ValueError that names the file.
        """
        config = path / _CONFIG if path.is_dir() else path
        raw = files.read_json(config)
        with naming(config):
            return cls._of(str(config), raw, _paths(path) if path.is_dir() else None)

    @classmethod
    def of(cls, model: nn.Module) -> "Base":
        """Of a model, by its config if it has one of Hugging Face's."""
        paths = [path for path, _ in named_modules(model) if path]
        config: Any = getattr(unwrapped(model), "config", None)
        raw = config.to_dict() if hasattr(config, "to_dict") else {}
        return cls._of("the model", raw if isinstance(raw, dict) else {}, paths)

    @classmethod
    def _of(cls, place: str, raw, paths: Collection[str] | None) -> "Base":
        if not isinstance(raw, dict):
            raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
        text = raw.get("text_config")
        raw = {**raw, **text} if isinstance(text, dict) else raw
        heads = _number(raw, "num_attention_heads")
        width, head_dim = _number(raw, "hidden_size"), _number(raw, "head_dim")
        if head_dim is None and heads and width:
            head_dim = width // heads
        kind = raw.get("model_type")
        return cls(
            place=place,
            model_type=kind if isinstance(kind, str) else None,
            heads=heads,
            kv_heads=_number(raw, "num_key_value_heads") or heads,
            head_dim=head_dim,
            paths=paths,
        )

    def heads_of(self, name: str) -> tuple[int, int] | None:
        """Number and size of the heads of q_proj or k_proj; None if they are not known."""
        heads = self.heads if name == "q_proj" else self.kv_heads
        return None if heads is None or self.head_dim is None else (heads, self.head_dim)


UNKNOWN = Base("")


def _number(raw: Mapping, key: str) -> int | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{key}: must be a number of at least 1, got {value!r}")
    return value


def _paths(directory: Path) -> list[str] | None:
    """Paths of the modules whose weights lie in directory; None if there are no safetensors."""
    keys: set[str] = set()
    if (directory / _INDEX).is_file():
        index = files.read_json(directory / _INDEX)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        keys.update(weights if isinstance(weights, dict) else ())
    for file in sorted(directory.glob("*.safetensors")) if not keys else ():
        keys.update(_keys(file))
    paths = {split(key)[0] for key in keys}
    if any(split(path)[1] in _EMBEDDINGS for path in paths):
        paths.add(_HEAD)  # has no weights in the files if it is tied to the embedding
    return sorted(paths) or None


def _keys(file: Path) -> list[str]:
    with naming(file), file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size)) if size < file.stat().st_size else {}
        if not isinstance(header, dict):
            raise ValueError(f"header: must be a JSON object, got {type(header).__name__}")
        return [key for key in header if key != "__metadata__"]
