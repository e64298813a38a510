"""The file of kohya's sd-scripts and of LyCORIS (LoRA and LoCon), which most image tools read.

A layer is NAME.lora_down.weight [r, in, ...], NAME.lora_up.weight [out, r, ...] and a number
NAME.alpha; the scaling is alpha / r, with rs_lora, too, whose alpha is written multiplied. With
Tucker's decomposition of a convolution, lora_down has kernel 1 and lora_mid [r, r, *kernel] lies
between. DoRA's magnitude is dora_scale [out, 1, ...]. NAME is a prefix for the component, and the
path with underscores for dots: only the model tells which underscores are dots.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.adapters import files, mapped
from lora_kernels.adapters.formats.adapter import FACTORS, MAGNITUDE, Adapter, Hints
from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.plain import (
    Part,
    collect,
    left_out,
    make_adapter,
    make_layer,
    plain_layers,
    scale_of,
    single_alpha,
)

__all__ = ["read", "recognises", "write"]

_MID, _ALPHA = "mid", "alpha"
_ENDINGS = {
    "lora_down.weight": FACTORS[0], "lora_up.weight": FACTORS[1], "lora_mid.weight": _MID,
    "alpha": _ALPHA, "dora_scale": MAGNITUDE,
}  # fmt: skip
# What else LyCORIS trains, which is no low-rank product.
_OTHERS = ("hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "oft_diag", "diff", "on_input")
# Prefix -> component of a pipeline; "" is the whole model.
_PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer", "lycoris_": "",
}  # fmt: skip
_FRONT = "model_"  # of a whole Llama; its decoder alone has it not
# Names with underscores in the models of diffusers and Transformers that these tools adapt.
_NAMES = (
    "add_k_proj", "add_q_proj", "add_v_proj", "context_embedder", "conv_in", "conv_out",
    "conv_shortcut", "down_blocks", "down_proj", "embed_tokens", "ff_context", "gate_proj",
    "guidance_embedder", "k_proj", "linear_1", "linear_2", "lm_head", "mid_block", "norm_out",
    "o_proj", "out_proj", "proj_in", "proj_mlp", "proj_out", "q_proj", "self_attn",
    "single_transformer_blocks", "text_model", "time_emb_proj", "time_embedding",
    "time_text_embed", "timestep_embedder", "text_embedder", "to_add_out", "to_k", "to_out", "to_q",
    "to_v", "transformer_blocks", "up_blocks", "up_proj", "v_proj", "x_embedder",
)  # fmt: skip
_PLAIN = (
    "attention", "attentions", "attn", "attn1", "attn2", "conv", "conv1", "conv2", "decoder",
    "dense", "downsamplers", "encoder", "fc1", "fc2", "ff", "h", "intermediate", "key", "layer",
    "layers", "linear", "linear1", "linear2", "lm", "mlp", "model", "net", "norm", "norm1",
    "norm2", "output", "proj", "q", "query", "resnets", "self", "transformer", "upsamplers",
    "value",
)  # fmt: skip
_PARTS = re.compile("|".join(sorted((*_NAMES, *_PLAIN), key=len, reverse=True)) + r"|\d+")


def recognises(contents: Contents) -> bool:
    """Whether keys end with lora_down.weight and lora_up.weight, or as others of LyCORIS do."""
    return contents.kind in ("safetensors", "pickle") and contents.has(
        ".lora_down.weight", ".lora_up.weight", *(f".{name}" for name in _OTHERS)
    )


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file; hints' base, if it has paths, tells the paths.

    Raises: ValueError, naming file and key, for what is damaged, does not fit together, has no
    alpha, is not LoRA (LoHa, LoKr, ...), or is no module of the base; OSError.
    """
    tensors = files.read_tensors(file)
    for key in tensors:
        if key.rpartition(".")[2].removesuffix(".weight") in _OTHERS:
            raise ValueError(f"{file}: {key}: LoHa, LoKr, OFT and full weights are no LoRA")
    found = collect(file, tensors, _ENDINGS)
    paths, notes = _paths(file, found, hints.base)
    layers, keys = [], {}
    for name, parts in found.items():
        place, path = f"{file}: {parts[FACTORS[0]].key}", paths[name]
        a, b = (parts[factor].value for factor in FACTORS)
        if _MID in parts:
            a = _of_tucker(a, parts[_MID].value, place)
            notes.append(f"remark: {path}: Tucker's three factors are two here, rounded once")
        scaling = scale_of(file, name, parts, _ALPHA, hints.lora_alpha)
        magnitude = _magnitude(parts, b, place)
        layers.append(
            make_layer(path, place, a, b, scaling, dropout=hints.dropout, magnitude=magnitude,
                       hints=hints)
        )  # fmt: skip
        keys[path] = parts
    return make_adapter(layers, keys, file, file, notes)


def _of_tucker(down: Tensor, mid: Tensor, place: str) -> Tensor:
    """The convolution [r, in, *kernel] that lora_mid after lora_down is, computed in float64."""
    if mid.dim() != down.dim() or mid.dim() < 3 or mid.shape[1] != down.shape[0]:
        raise ValueError(f"{place}: {list(down.shape)} does not go with lora_mid {list(mid.shape)}")
    product = torch.einsum("rs...,si->ri...", mid.double(), down.flatten(1).double())
    return product.to(down.dtype)


def _magnitude(parts: Mapping[str, Part], b: Tensor, place: str) -> Tensor | None:
    if MAGNITUDE not in parts:
        return None
    scale = parts[MAGNITUDE].value
    if b.dim() > 2:
        raise ValueError(f"{place}: DoRA of a convolution is not read")
    if list(scale.shape) != [b.shape[0], 1]:
        raise ValueError(
            f"{place}: dora_scale must have shape {[b.shape[0], 1]}, a number for each output, got "
            f"{list(scale.shape)}"
        )
    return scale.flatten()


# ---- names ----


def _paths(file: Path, names: Iterable[str], base: Base) -> tuple[dict[str, str], list[str]]:
    """The path of each name, and what had to be assumed. Raises: ValueError."""
    fronts = {name: next((p for p in _PREFIXES if name.startswith(p)), "") for name in names}
    components = {_PREFIXES.get(front, "") for front in fronts.values()}
    alone = len(components) == 1
    known: dict[str, str | None] = {}
    for own in base.paths or ():
        flat = own.replace(".", "_")
        if known.setdefault(flat, own) != own:
            known[flat] = None  # two modules of one name
    paths: dict[str, str] = {}
    guessed: list[str] = []
    kept: list[str] = []
    for name, front in fronts.items():
        inside, component = name.removeprefix(front), _PREFIXES.get(front, "")
        if base.paths is not None and alone:
            tried = (inside, inside.removeprefix(_FRONT), _FRONT + inside)
            found = next((known[flat] for flat in tried if flat in known), None)
            if found is None:
                why = "two modules" if inside in known else "no module"
                raise ValueError(f"{file}: {name}: {why} of {base.place} can be called so")
        else:
            found = _guess(inside)
            (guessed if found != inside else kept).append(name)
        paths[name] = found if alone or not component else f"{component}.{found}"
    notes = []
    if alone and components != {""}:
        notes.append(f"{file}: for the component {next(iter(components))!r} of a pipeline")
    if guessed:
        notes.append(
            f"{file}: {len(guessed)} paths are guessed ({guessed[0]} is {paths[guessed[0]]}): "
            f"--base with weights tells them"
        )
    if kept:
        notes.append(f"{file}: {len(kept)} names are kept as they are ({kept[0]}), for want of "
                     f"--base with weights")  # fmt: skip
    return paths, notes


def _guess(name: str) -> str:
    """The path of a name that consists of names which are known; any other name as it is."""
    parts, position = [], 0
    while position < len(name):
        match = _PARTS.match(name, position)
        if match is None or name[match.end() : match.end() + 1] not in ("", "_"):
            return name
        parts.append(match[0])
        position = match.end() + 1
    return ".".join(parts)


def _name(path: str, has_two_encoders: bool) -> str:
    """The name of a path: with LyCORIS' prefix, or with that of the part of a pipeline."""
    component, _, inside = path.partition(".")
    skipped = "lora_te_" if has_two_encoders else "lora_te1_"
    for prefix, known in _PREFIXES.items():
        if known and known == component and prefix != skipped:
            return prefix + inside.replace(".", "_")
    is_unet = component in ("down_blocks", "up_blocks", "mid_block")
    prefix = "lora_unet_" if is_unet else "lora_te_" if component == "text_model" else "lycoris_"
    return prefix + path.replace(".", "_")


# ---- writing ----


def write(adapter: Adapter, file: Path, hints: Hints) -> list[str]:
    """Writes the file; returns lines about it. Raises: ValueError, OSError."""
    if file.is_dir() or file.suffix != ".safetensors":
        raise ValueError(f"{file}: must be the file to write, with a name in .safetensors")
    layers = plain_layers(adapter, "kohya", ("linear", "convolution"), dora=True)
    has_two_encoders = any(layer.path.startswith("text_encoder_2.") for layer in layers)
    tensors: dict[str, Tensor] = {}
    rounded = []
    for layer in layers:
        name = _name(layer.path, has_two_encoders)
        if f"{name}.alpha" in tensors:
            raise ValueError(f"{file}: {layer.path}: another module is called {name}, too")
        alpha = layer.scaling * layer.r
        written = single_alpha(layer, alpha)
        tensors[f"{name}.alpha"] = torch.tensor(written, dtype=torch.float32)
        if written != alpha:
            rounded.append(layer.path)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.a, layer.b
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude[:, None]
    with files.replacing(file.parent, [file.name]) as scratch:
        mapped.write_safetensors(scratch / file.name, tensors, {"format": "pt"})
    lines = [f"{file}: LoRA on {len(layers)} modules for kohya and LyCORIS"]
    if rounded:
        lines.append(f"remark: alpha of {len(rounded)} modules ({rounded[0]}) becomes a float32")
    return [*lines, *left_out(adapter, "kohya")]
