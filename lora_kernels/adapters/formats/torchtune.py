"""torchtune's adapter_model.pt (adapter_N.pt before 0.5): a state dict under torchtune's names.

Factors are lora_a.weight [r, in] and lora_b.weight [out, r], DoRA's magnitude is magnitude [out].
Rows of q_proj and k_proj, of lora_b and of magnitude, are interleaved, but not of Qwen2.
alpha is not in the file but in adapter_config.json beside it.

Beside it torchtune writes PEFT's files, too. There the magnitudes of q_proj and k_proj are wrong:
they keep torchtune's order of rows.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, MAGNITUDE, Adapter, AdapterLayer, Hints
from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.formats.contents import CONFIG, Contents, sibling_config
from lora_kernels.adapters.formats.names import Names, halves, interleaved, rotated
from lora_kernels.adapters.formats.plain import (
    alpha_of,
    collect,
    left_out,
    make_adapter,
    make_layer,
    of_one_rank,
    of_one_scaling,
    plain_layers,
    told_alpha,
)
from lora_kernels.model.paths import join, split

__all__ = ["read", "recognises", "write"]

_WEIGHTS = "adapter_model.pt"
_ENDINGS = {"lora_a.weight": FACTORS[0], "lora_b.weight": FACTORS[1], "magnitude": MAGNITUDE}
_NAMES = Names("torchtune")
# Hugging Face's model_type -> whether rows are interleaved, of models with the names of the table.
_INTERLEAVED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}


def recognises(contents: Contents) -> bool:
    """Whether keys end with lora_a.weight and lora_b.weight."""
    return contents.kind in ("pickle", "safetensors") and contents.has(
        ".lora_a.weight", ".lora_b.weight"
    )


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file of torchtune's; hints' base tells the heads of q_proj and k_proj.

    Raises: ValueError, naming file and key, for what is damaged, does not fit together, or cannot
    be understood without --base or --lora-alpha; OSError.
    """
    tensors = files.read_tensors(file)
    found = collect(file, tensors, _ENDINGS)
    config = sibling_config(file)
    alpha = told_alpha(file, file.parent / CONFIG, config.get("lora_alpha"), hints.lora_alpha)
    layers, keys = [], {}
    for name, parts in found.items():
        a, b = (parts[factor].value for factor in FACTORS)
        magnitude = parts[MAGNITUDE].value if MAGNITUDE in parts else None
        place = f"{file}: {parts[FACTORS[1]].key}"
        with naming(place):
            path = _NAMES.to_hf(name)
            if config.get("r", a.shape[0]) != a.shape[0]:
                raise ValueError(f"has rank {a.shape[0]}, {CONFIG} says r={config['r']}")
        layer = make_layer(
            path, place, a, b, alpha / a.shape[0],
            dropout=hints.dropout, magnitude=magnitude, hints=hints,
        )  # fmt: skip
        with naming(file):
            heads = _heads(path, hints.base, layer.base.outputs)
        layers.append(layer if heads is None else _in_halves(layer, heads))
        keys[path] = parts
    return make_adapter(layers, keys, file.parent / CONFIG, file)


def _heads(path: str, base: Base, outputs: int) -> tuple[int, int] | None:
    kind = base.model_type
    if kind is not None and kind not in _INTERLEAVED:
        known = ", ".join(_INTERLEAVED)
        raise ValueError(f"{base.place}: model_type: {kind!r} is none of torchtune's: {known}")
    return rotated(path, base, outputs) if kind is None or _INTERLEAVED[kind] else None


def _in_halves(layer: AdapterLayer, heads: tuple[int, int]) -> AdapterLayer:
    magnitude = None if layer.magnitude is None else halves(layer.magnitude, heads)
    return replace(layer, lora_B=halves(layer.lora_B, heads), magnitude=magnitude)


def write(adapter: Adapter, directory: Path, hints: Hints) -> list[str]:
    """Writes adapter_model.pt and adapter_config.json; returns lines about them.

    Raises: ValueError for what torchtune does not have, and for q_proj and k_proj without a base
    model that tells their heads; OSError.
    """
    layers = plain_layers(adapter, "torchtune", ("linear",), dora=True)
    layers, r, padded = of_one_rank(layers)
    layers, scaling, scaled = of_one_scaling(layers)
    state: dict[str, Tensor] = {}
    for layer in layers:
        name, b, magnitude = _NAMES.from_hf(layer.path), layer.b, layer.magnitude
        heads = _heads(layer.path, hints.base, b.shape[0])
        if heads is not None:
            b = interleaved(b, heads)
            magnitude = None if magnitude is None else interleaved(magnitude, heads)
        state |= {f"{name}.lora_a.weight": layer.a, f"{name}.lora_b.weight": b}
        if magnitude is not None:
            state[join(name, "magnitude")] = magnitude
    config = {
        "base_model_name_or_path": adapter.base_model,
        "lora_alpha": alpha_of(scaling, r),
        "peft_type": "LORA",
        "r": r,
        "target_modules": sorted({split(layer.path)[1] for layer in layers}),
    }
    with files.replacing(directory, (_WEIGHTS, CONFIG)) as scratch:
        files.write_pickle(scratch / _WEIGHTS, state)
        (scratch / CONFIG).write_text(json.dumps(_told(config)) + "\n")
    lines = [f"{directory}: LoRA on {len(layers)} modules for torchtune"]
    return [*lines, *padded, *scaled, *left_out(adapter, "torchtune")]


def _told(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if value is not None}
