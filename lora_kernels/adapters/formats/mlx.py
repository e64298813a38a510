"""MLX's directory, as mlx-lm writes it: adapters.safetensors and adapter_config.json.

Linears have lora_a [in, r] and lora_b [r, out], embeddings lora_a [num, r] and lora_b [r, dim], all
transposed against PEFT's; DoRA's magnitude is m. The config has one rank and one scale, which
multiplies the update as it is: there is no alpha. Names are Hugging Face's.
"""

import json
from pathlib import Path

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, MAGNITUDE, Adapter, Hints
from lora_kernels.adapters.formats.contents import CONFIG, Contents
from lora_kernels.adapters.formats.plain import (
    EMBEDDINGS,
    collect,
    left_out,
    make_adapter,
    make_layer,
    of_one_rank,
    of_one_scaling,
    plain_layers,
)
from lora_kernels.model.paths import is_named

__all__ = ["read", "recognises", "write"]

_WEIGHTS = "adapters.safetensors"
_ENDINGS = {"lora_a": FACTORS[0], "lora_b": FACTORS[1], "m": MAGNITUDE}


def recognises(contents: Contents) -> bool:
    """Whether keys end with lora_a and lora_b."""
    return contents.kind == "safetensors" and contents.has(".lora_a", ".lora_b")


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file of mlx-lm's, with its adapter_config.json beside it.

    Raises: FileNotFoundError; ValueError, naming file and key, for what is damaged or does not fit
    together, and for experts of a mixture.
    """
    config = file.parent / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file, though MLX keeps the scale there")
    raw = files.read_json(config)
    with naming(config):
        rank, scale, dropout = _parameters(raw)
    tensors, _ = files.read_safetensors(file)
    layers = []
    found = collect(file, tensors, _ENDINGS)
    for path, parts in found.items():
        a, b = (parts[name].value for name in FACTORS)
        place = f"{file}: {parts[FACTORS[0]].key}"
        if a.dim() > 2:
            raise ValueError(
                f"{place}: experts of a mixture: MLX has a matrix for each projection, "
                f"Transformers and PEFT one for gate and up: merge it there (mlx_lm.fuse)"
            )
        is_embedding = is_named(path, (*EMBEDDINGS, *hints.embedding))
        magnitude = parts[MAGNITUDE].value if MAGNITUDE in parts else None
        if magnitude is not None and is_embedding:
            raise ValueError(f"{file}: {parts[MAGNITUDE].key}: DoRA of an embedding is not read")
        if a.dim() == 2 and a.shape[1] != rank:
            raise ValueError(f"{place}: has rank {a.shape[1]}, {config} says {rank}")
        if (raw.get("fine_tune_type") == "dora") != (magnitude is not None) and not is_embedding:
            raise ValueError(f"{place}: fine_tune_type and the magnitudes do not go together")
        layers.append(
            make_layer(
                path, place, a.mT, b.mT, scale, kind="embedding" if is_embedding else "linear",
                dropout=dropout, magnitude=magnitude, hints=hints,
            )
        )  # fmt: skip
    base = raw.get("model")
    return make_adapter(
        layers, found, config, file, base_model=base if isinstance(base, str) else None
    )


def _parameters(raw) -> tuple[float, float, float]:
    """Rank, scale and dropout. Raises: ValueError that names the key."""
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(f"fine_tune_type: must be 'lora' or 'dora', got {kind!r}")
    numbers = raw.get("lora_parameters")
    if not isinstance(numbers, dict):
        raise ValueError(f"lora_parameters: must be a JSON object, got {numbers!r}")
    found = []
    for key, default in (("rank", None), ("scale", None), ("dropout", 0.0)):
        value = numbers.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"lora_parameters: {key}: must be a number, got {value!r}")
        found.append(value)
    rank, scale, dropout = found
    return rank, float(scale), float(dropout)


def write(adapter: Adapter, directory: Path, hints: Hints) -> list[str]:
    """Writes the two files; returns lines about them. Raises: ValueError, OSError."""
    layers = plain_layers(adapter, "MLX", ("linear", "embedding"), dora=True)
    layers, r, padded = of_one_rank(layers)
    layers, scale, scaled = of_one_scaling(layers)
    tensors = {}
    for layer in layers:
        if (layer.magnitude is not None) != adapter.use_dora:
            raise ValueError(f"{layer.path}: MLX has DoRA on all layers or on none")
        tensors[f"{layer.path}.lora_a"], tensors[f"{layer.path}.lora_b"] = layer.a.mT, layer.b.mT
        if layer.magnitude is not None:
            tensors[f"{layer.path}.m"] = layer.magnitude
    config = {
        "fine_tune_type": "dora" if adapter.use_dora else "lora",
        "lora_parameters": {
            "rank": r,
            "scale": scale,
            "dropout": max(layer.dropout for layer in layers),
            "keys": [layer.path for layer in layers],
        },
        "model": adapter.base_model,
        "num_layers": 0,  # the keys are whole paths
    }
    with files.replacing(directory, (_WEIGHTS, CONFIG)) as scratch:
        mapped.write_safetensors(scratch / _WEIGHTS, tensors, {"format": "mlx"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=4) + "\n")
    lines = [f"{directory}: LoRA on {len(layers)} modules for MLX", *padded, *scaled]
    return [*lines, *left_out(adapter, "MLX", dropout=False)]
