"""GGUF, llama.cpp's file of an adapter; the package gguf reads and writes it.

Tensors are lora_a [r, in] and lora_b [out, r] of NAME.weight, but lora_a of token_embd is [num, r].
Rows of q_proj and k_proj are interleaved for Llama and its relatives. The update is scaled by
adapter.lora.alpha / r: there is one alpha for all, and neither rsLoRA nor DoRA.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, Adapter, Hints, Kind
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.names import Names, halves, interleaved, rotated
from lora_kernels.adapters.formats.plain import (
    collect,
    left_out,
    make_adapter,
    make_layer,
    of_one_scaling,
    plain_layers,
    single_alpha,
)
from lora_kernels.adapters.untold import ALPHA, Untold
from lora_kernels.checks import check_alpha

__all__ = ["contents_of", "read", "recognises", "write"]

_ENDINGS = {"weight.lora_a": FACTORS[0], "weight.lora_b": FACTORS[1]}
_NAMES = Names("llama.cpp")
# Hugging Face's model_type -> llama.cpp's architecture, of models with the names of the table.
_ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "granite": "granite",
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "smollm3": "smollm3",
}  # fmt: skip
_INTERLEAVED = ("granite", "llama", "smollm3")
_EMBEDDING, _HEAD = "token_embd", "output"
_WITHOUT_HEAD = ("gemma", "gemma2")  # whose embedding is their head


def recognises(contents: Contents) -> bool:
    """Whether the file is a GGUF."""
    return contents.kind == "gguf"


def _gguf(file: Path) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{file}: GGUF needs the package gguf: pip install gguf") from None
    return gguf


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a GGUF; for a Llama's q_proj and k_proj, hints' base tells the heads.

    Raises: ValueError, naming file and key, for what is damaged, no adapter, without alpha, or of
    an architecture that is not known; OSError.
    """
    fields, tensors = contents_of(file)
    kinds = [fields.get(key) for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"]:
        raise ValueError(f"{file}: general.type, adapter.type: must be adapter, lora, got {kinds}")
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES.values():
        raise ValueError(f"{file}: general.architecture: {architecture!r} is not supported")
    alpha = fields.get("adapter.lora.alpha") or hints.lora_alpha
    if alpha is None:
        what = f"{file}: adapter.lora.alpha: missing, or 0"
        raise Untold(what, ALPHA, assumed={"lora_alpha": 1.0})
    check_alpha(alpha, f"{file}: adapter.lora.alpha")
    files.check_finite(file, tensors)
    layers, keys = [], {}
    for name, parts in collect(file, tensors, _ENDINGS).items():
        a, b = (parts[factor].value for factor in FACTORS)
        place, is_embedding = f"{file}: {parts[FACTORS[0]].key}", name == _EMBEDDING
        a = a.mT if is_embedding else a
        with naming(place):
            path = _NAMES.to_hf(name)
            scaling = alpha / a.shape[0]
            kind: Kind = "embedding" if is_embedding else "linear"
            layer = make_layer(
                path, place, a, b, scaling, kind=kind, dropout=hints.dropout, hints=hints
            )
            if architecture in _INTERLEAVED:
                heads = rotated(path, hints.base, layer.base.outputs)
                layer = layer if heads is None else replace(layer, lora_B=halves(b, heads))
        layers.append(layer)
        keys[path] = parts
    return make_adapter(layers, keys, file, file, base_model=_base_name(fields))


def contents_of(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of any GGUF. Raises: ValueError for a damaged one; OSError."""
    gguf = _gguf(file)
    try:
        reader = gguf.GGUFReader(file, "c")
        mapped.adopt(reader.data.base)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: _as_torch(gguf, tensor) for tensor in reader.tensors}
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file}: damaged, or not a GGUF: {error}") from None


def _base_name(fields: Mapping) -> str | None:
    name = fields.get("general.base_model.0.repo_url")
    prefix = "https://huggingface.co/"
    return name.removeprefix(prefix) if isinstance(name, str) and name else None


def _as_torch(gguf: ModuleType, tensor) -> Tensor:
    """A tensor of the reader; one of blocks becomes float32."""
    kinds = gguf.GGMLQuantizationType
    if tensor.tensor_type == kinds.BF16:
        return torch.from_numpy(tensor.data).view(torch.bfloat16)
    if tensor.tensor_type in (kinds.F32, kinds.F16, kinds.F64):
        return torch.from_numpy(tensor.data)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def write(adapter: Adapter, file: Path, hints: Hints) -> list[str]:
    """Writes the file; hints' base tells architecture and heads. Returns lines about it.

    Raises: ValueError for what llama.cpp does not have, such as DoRA, and without a base; OSError.
    """
    gguf = _gguf(file)
    if file.is_dir():
        raise ValueError(f"{file}: is a directory, must be the file to write")
    model_type = hints.base.model_type
    if model_type is None:
        raise ValueError(
            f"{file}: GGUF holds the architecture of the base model: give --base, its directory or "
            f"config.json"
        )
    architecture = _ARCHITECTURES.get(model_type)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"{hints.base.place}: model_type: must be one of {known} for GGUF")
    layers = plain_layers(adapter, "GGUF", ("linear", "embedding"))
    layers, alpha, lines = of_one_scaling(layers, lambda layer: layer.scaling * layer.r)
    written = single_alpha(layers[0], alpha)
    if written != alpha:
        lines.append(f"remark: alpha {alpha!r} is {written!r} in GGUF, a float32")
    tensors = {}
    for layer in layers:
        name, a, b = _NAMES.from_hf(layer.path), layer.a, layer.b
        if name == _HEAD and architecture in _WITHOUT_HEAD:
            raise ValueError(f"{layer.path}: llama.cpp's {architecture} has no head of its own")
        if architecture in _INTERLEAVED:
            heads = rotated(layer.path, hints.base, b.shape[0])
            b = b if heads is None else interleaved(b, heads)
        tensors[f"{name}.weight.lora_a"] = a.mT if name == _EMBEDDING else a
        tensors[f"{name}.weight.lora_b"] = b
    with files.replacing(file.parent, [file.name]) as scratch:
        writer = gguf.GGUFWriter(scratch / file.name, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            kind = _kind(gguf, tensor)
            size = tensor.numel() * (4 if kind.name == "F32" else 2)
            writer.add_tensor_info(name, tensor.shape, None, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(_as_numpy(tensor.detach()))
            mapped.release()
        writer.close()
        _check_complete(scratch / file.name, file)
    lines = [f"{file}: LoRA on {len(layers)} modules for llama.cpp ({architecture})", *lines]
    return [*lines, *left_out(adapter, "GGUF")]


def _check_complete(written: Path, file: Path) -> None:
    """Raises: OSError if written, which becomes file, lacks its end: NumPy does not tell it."""
    try:
        contents_of(written)
    except ValueError:
        raise OSError(f"{file}: was not written to its end: is the disk full?") from None


def _kind(gguf: ModuleType, tensor: Tensor):
    """GGUF's type; float64, which llama.cpp does not multiply, is rounded to float32."""
    kinds = gguf.GGMLQuantizationType
    return {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}.get(tensor.dtype, kinds.F32)


def _as_numpy(tensor: Tensor):
    tensor = (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
