"""diffusers' file, pytorch_lora_weights.safetensors: PEFT's factors under the paths of the model.

A pipeline's file has the name of a component in front of every key, unet. or text_encoder., and one
that a model saves has none. Since 0.34 the header holds PEFT's whole config as JSON, with the same
names in front of its keys. Without it diffusers takes lora_alpha = r, or what alpha says.
"""

import json
import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, MAGNITUDE, Adapter, Hints, renamed
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.peft_config import make_config, parse_config
from lora_kernels.adapters.formats.plain import (
    PlainLayer,
    collect,
    left_out,
    make_adapter,
    make_layer,
    plain_layers,
    scale_of,
)
from lora_kernels.model.targets import Hyperparameters

__all__ = ["COMPONENTS", "read", "recognises", "write"]

_WEIGHTS = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
    "prior", "image_encoder",
)  # fmt: skip
_ALPHA = "alpha"
_ENDINGS = {
    "lora_A.weight": FACTORS[0], "lora_B.weight": FACTORS[1], "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE, "alpha": _ALPHA,
}  # fmt: skip


def recognises(contents: Contents) -> bool:
    """Whether keys end as PEFT's, but do not begin so."""
    return (
        contents.kind == "safetensors"
        and contents.has(".lora_A.weight")
        and not any(key.startswith("base_model.model.") for key in contents.keys)
    )


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file of diffusers; the only component's name is taken off the paths.

    Raises: ValueError, naming file and key, for what is damaged, does not fit together, or is
    without lora_alpha in header, file and hints; OSError.
    """
    tensors, metadata = files.read_safetensors(file)
    with naming(f"{file}: metadata {_METADATA}"):
        configs = _configs(metadata)
    found = collect(file, tensors, _ENDINGS)
    components = {_component(path) for path in found}
    alone = len(components) == 1 and components != {""}
    layers, keys = [], {}
    for path, parts in found.items():
        component = _component(path)
        inside = path.removeprefix(f"{component}.") if component else path
        a, b = (parts[factor].value for factor in FACTORS)
        magnitude = parts[MAGNITUDE].value if MAGNITUDE in parts else None
        place, dropout = f"{file}: {parts[FACTORS[0]].key}", hints.dropout
        numbers = configs.get(component, configs.get(""))
        with naming(f"{file}: metadata {_METADATA}"):
            spec = None if numbers is None else numbers.of(inside)
        if spec is None:
            scaling = scale_of(file, path, parts, _ALPHA, hints.lora_alpha)
        else:
            scaling, dropout = spec.scaling, spec.lora_dropout
            if spec.r != a.shape[0] or spec.use_dora != (magnitude is not None):
                raise ValueError(
                    f"{place}: rank {a.shape[0]}, use_dora {magnitude is not None}, but "
                    f"{_METADATA} says {spec.r}, {spec.use_dora}"
                )
        if magnitude is not None and a.dim() > 2:
            raise ValueError(f"{place}: DoRA of a convolution is not read")
        target = inside if alone else path
        layers.append(
            make_layer(target, place, a, b, scaling, dropout=dropout, magnitude=magnitude,
                       hints=hints)
        )  # fmt: skip
        keys[target] = parts
    notes = [f"{file}: for the component {components.pop()!r} of a pipeline"] if alone else []
    return make_adapter(layers, keys, file, file, notes)


def _configs(metadata: Mapping[str, str]) -> dict[str, Hyperparameters]:
    """The numbers by component; under "" those of a file without components."""
    raw = json.loads(metadata.get(_METADATA, "{}"))
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    by_component: dict[str, dict] = defaultdict(dict)
    for key, value in raw.items():
        front, _, name = key.partition(".")
        component = front if name and front in COMPONENTS else ""
        by_component[component][name if component else key] = value
    return {name: parse_config(config).numbers for name, config in by_component.items()}


def _component(path: str) -> str:
    front, _, inside = path.partition(".")
    return front if inside and front in COMPONENTS else ""


def write(adapter: Adapter, path: Path, hints: Hints) -> list[str]:
    """Writes the file into a directory, or as path if that ends so. Returns lines about it.

    Raises: ValueError for what diffusers does not have; OSError.
    """
    file = path if path.suffix == ".safetensors" else path / _WEIGHTS
    layers = plain_layers(adapter, "diffusers", ("linear", "convolution"), dora=True)
    tensors: dict[str, Tensor] = {}
    by_component: dict[str, dict[str, PlainLayer]] = defaultdict(dict)
    for layer in layers:
        tensors[f"{layer.path}.lora_A.weight"] = layer.a
        tensors[f"{layer.path}.lora_B.weight"] = layer.b
        if layer.magnitude is not None:
            tensors[f"{layer.path}.lora_magnitude_vector"] = layer.magnitude
        by_component[_component(layer.path)][layer.path] = layer
    whole = "" in by_component
    if whole and len(by_component) > 1:
        raise ValueError(f"{file}: some paths begin with a component's name, and some do not")
    told = {}
    for component, members in by_component.items():
        front = "" if whole else f"{component}."
        own = {path: adapter.layers[path] for path in members}
        part = replace(adapter, layers=own, target_modules=sorted(own), entries={})
        part = renamed(part, operator.methodcaller("removeprefix", front))
        ranks = {path.removeprefix(front): layer.r for path, layer in members.items()}
        for key, value in make_config(part, ranks, []).items():
            told[f"{front}{key}"] = value
    metadata = {"format": "pt", _METADATA: json.dumps(told, indent=2, sort_keys=True)}
    with files.replacing(file.parent, [file.name]) as scratch:
        mapped.write_safetensors(scratch / file.name, tensors, metadata)
    lines = [f"{file}: LoRA on {len(layers)} modules for diffusers"]
    if whole:
        lines.append("remark: of one model: load it by load_lora_adapter(..., prefix=None)")
    return [*lines, *left_out(adapter, "diffusers", dropout=False)]
