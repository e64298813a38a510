"""AdapterHub's directory: pytorch_adapter.bin or adapter.safetensors, and adapter_config.json.

Keys are PATH.loras.NAME.lora_A [r, in] and lora_B [out, r]; a fused c_attn is laid out as loralib's
MergedLinear. The update is scaled by alpha / r, but by 1 in files of adapters before 1.1. With
composition_mode "scale" it is (IA)^3, and with use_gating the input scales it: no LoRA either.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, Adapter, AdapterLayer, BaseModule, Hints
from lora_kernels.adapters.formats.contents import CONFIG, Contents
from lora_kernels.adapters.formats.plain import (
    alpha_of,
    collect,
    left_out,
    make_adapter,
    make_layer,
    of_one_rank,
    of_one_scaling,
    plain_layers,
)
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.model.paths import is_named, join, split
from lora_kernels.spec import OutputSplits

__all__ = ["read", "recognises", "write"]

_WEIGHTS = "pytorch_adapter.bin"
_LORAS = re.compile(r"^(?P<path>.+)\.loras\.(?P<name>[^.]+)\.(?P<rest>[^.]+(\.weight)?)$")
_FUSED = "c_attn"  # the only fused projection that it adapts
_MATRICES = ("q", "k", "v")
# Place of a layer -> what its module is called, in the models that adapters knows.
_ATTENTION = {
    "q": ("query", "q_proj", "q_lin"), "k": ("key", "k_proj", "k_lin"),
    "v": ("value", "v_proj", "v_lin"),
}  # fmt: skip
_MLP = {
    "intermediate_lora": ("intermediate.dense", "mlp.down_proj", "ffn.lin1", "mlp.c_fc"),
    "output_lora": ("output.dense", "mlp.up_proj", "ffn.lin2", "mlp.c_proj"),
}
_FIXED = (1, 1)  # the version from which on alpha / r is what was trained


def recognises(contents: Contents) -> bool:
    """Whether keys have .loras. in them, and the config beside is AdapterHub's."""
    return isinstance(contents.config.get("config"), dict) and any(
        _LORAS.match(key) for key in contents.keys
    )


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file of AdapterHub's, with its adapter_config.json beside it.

    Raises: ValueError, naming file and key, for what is damaged, does not fit together or is no
    LoRA; OSError.
    """
    config = file.parent / CONFIG
    raw = files.read_json(config)
    with naming(config):
        r, alpha, dropout, matrices, notes = _parse(raw)
    tensors = files.read_tensors(file)
    plain: dict[str, Tensor] = {}
    keys_of: dict[str, str] = {}
    for key, value in tensors.items():
        match = _LORAS.match(key)
        if match is None or match["rest"] not in FACTORS:
            raise ValueError(
                f"{file}: {key}: is no factor of LoRA, must end with .loras.NAME.lora_A"
            )
        short = join(match["path"], match["rest"])
        if short in plain:
            raise ValueError(f"{file}: {key}: two adapters are in it, also {keys_of[short]}")
        plain[short], keys_of[short] = value, key
    found = collect(file, plain, dict(zip(FACTORS, FACTORS, strict=True)))
    layers = []
    for path, parts in found.items():
        a, b = (parts[factor].value for factor in FACTORS)
        place = f"{file}: {keys_of[parts[FACTORS[0]].key]}"
        if b.dim() != 2 or b.shape[1] != r:
            raise ValueError(f"{place}: must have rank {r} as {CONFIG} says, got {list(b.shape)}")
        if split(path)[1] == _FUSED:
            layers.append(_fused(path, place, a, b, alpha / r, dropout, matrices, hints))
        else:
            layers.append(make_layer(path, place, a, b, alpha / r, dropout=dropout, hints=hints))
    base = raw.get("model_name")
    adapter = make_adapter(
        layers, found, config, file, notes, base if isinstance(base, str) and base else None
    )
    source = replace(adapter.read_from, key=lambda entry: keys_of.get(entry, entry))
    return replace(adapter, source=source)


def _parse(raw) -> tuple[int, float, float, list[str], list[str]]:
    """r, alpha, dropout, attn_matrices, and a note on alpha. Raises: ValueError for no LoRA."""
    config = raw.get("config") if isinstance(raw, dict) else None
    if not isinstance(config, dict):
        raise ValueError("config: must be a JSON object")
    for key, wanted in (
        ("architecture", "lora"), ("composition_mode", "add"), ("use_gating", False),
        ("use_dora", False), ("vera_d", None), ("vera_b", None),
    ):  # fmt: skip
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f"config: {key}: only {wanted!r} is LoRA as others have it, got {config[key]!r}"
            )
    r = check_rank(config.get("r"), "config")
    if r < 1:
        raise ValueError(f"config: r: must be at least 1, got {r}")
    if config.get("alpha") is None:
        raise ValueError("config: alpha: missing")
    alpha = check_alpha(config["alpha"], "config")
    matrices = config.get("attn_matrices", [])
    if not isinstance(matrices, list) or any(letter not in _MATRICES for letter in matrices):
        raise ValueError(f"config: attn_matrices: must be of 'q', 'k', 'v', got {matrices!r}")
    version, notes = raw.get("version", ""), []
    numbers = re.match(r"adapters\.(\d+)\.(\d+)", version if isinstance(version, str) else "")
    if numbers and tuple(map(int, numbers.groups())) < _FIXED and alpha != r:
        notes.append(f"remark: {version} multiplied by 1, not by alpha / r: so does the result")
        alpha = float(r)
    return r, alpha, check_dropout(config.get("dropout") or 0.0, "config"), matrices, notes


def _fused(
    path: str, place: str, a: Tensor, b: Tensor, scaling: float, dropout: float,
    matrices: list[str], hints: Hints,
) -> AdapterLayer:  # fmt: skip
    """The layer of a c_attn, of which matrices are adapted."""
    enabled = tuple(letter in matrices for letter in _MATRICES)
    count, r = sum(enabled), b.shape[1]
    if a.dim() != 2 or count == 0 or a.shape[0] != r * count or b.shape[0] % count:
        raise ValueError(
            f"{place}: {list(a.shape)} and lora_B {list(b.shape)} are not those of "
            f"attn_matrices {matrices}"
        )
    size = b.shape[0] // count
    layer = make_layer(path, place, a[:r], b[:size], scaling, dropout=dropout, hints=hints)
    splits = OutputSplits((size,) * 3, enabled)
    base = BaseModule("linear", a.shape[1], 3 * size, hints.fan_in_fan_out)
    return replace(layer, base=base, spec=replace(layer.spec, splits=splits), lora_A=a, lora_B=b)


# ---- writing ----


def write(adapter: Adapter, directory: Path, hints: Hints) -> list[str]:
    """Writes the two files; returns lines about them.

    Raises: ValueError for what adapters does not have: DoRA, and modules in other places than
    those of its config; OSError.
    """
    fused = {p: layer for p, layer in adapter.layers.items() if layer.spec.splits is not None}
    for path, layer in fused.items():
        splits = layer.spec.splits
        if split(path)[1] != _FUSED or (splits is not None and len(set(splits.sizes)) > 1):
            raise ValueError(f"{path}: AdapterHub has groups of columns in c_attn only, equal ones")
    others = {path: layer for path, layer in adapter.layers.items() if path not in fused}
    layers = plain_layers(replace(adapter, layers=others), "AdapterHub", ("linear",))
    state: dict[str, Tensor] = {}
    places = _places(adapter)
    scalings = {layer.spec.scaling for layer in fused.values()}
    ranks = {layer.spec.r for layer in fused.values()}
    padded: list[str] = []
    scaled: list[str] = []
    if layers:
        layers, r, padded = of_one_rank(layers)
        layers, scaling, scaled = of_one_scaling(layers)
        scalings.add(scaling)
        ranks.add(r)
    if len(scalings) > 1 or len(ranks) > 1:
        raise ValueError(f"{directory}: AdapterHub has one rank and one scaling, also for c_attn")
    for plain in layers:
        state |= {
            f"{plain.path}.loras.adapter.{n}": t
            for n, t in zip(FACTORS, (plain.a, plain.b), strict=True)
        }
    for path, layer in fused.items():
        front = f"{path}.loras.adapter."
        state |= {f"{front}lora_A": layer.lora_A, f"{front}lora_B": layer.lora_B}
    r, scaling = ranks.pop(), scalings.pop()
    dropout = max(layer.spec.lora_dropout for layer in adapter.layers.values())
    config = {
        "alpha": alpha_of(scaling, r), "architecture": "lora", "composition_mode": "add",
        "dropout": dropout, "dtype": None, "init_weights": "lora", "init_weights_seed": None,
        "leave_out": [], "r": r, "use_dora": False, "use_gating": False, "vera_b": None,
        "vera_d": None, **places,
    }  # fmt: skip
    told = {
        "config": config, "model_name": adapter.base_model or "", "name": "adapter",
        "model_type": hints.base.model_type, "version": "adapters.1.3.0",
    }  # fmt: skip
    with files.replacing(directory, (_WEIGHTS, CONFIG)) as scratch:
        files.write_pickle(scratch / _WEIGHTS, state)
        (scratch / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    lines = [f"{directory}: LoRA on {len(adapter.layers)} modules for AdapterHub"]
    return [*lines, *padded, *scaled, *left_out(adapter, "AdapterHub", dropout=False)]


def _places(adapter: Adapter) -> Mapping:
    """The config's words for the modules. Raises: ValueError for one that it cannot mean."""
    matrices: set[str] = set()
    mlp = dict.fromkeys(_MLP, False)
    for path, layer in adapter.layers.items():
        letter = next((x for x, names in _ATTENTION.items() if split(path)[1] in names), None)
        place = next((x for x, names in _MLP.items() if is_named(path, names)), None)
        if layer.spec.splits is not None:
            flags = zip(_MATRICES, layer.spec.splits.enabled, strict=True)
            matrices.update(name for name, enabled in flags if enabled)
        elif letter is not None:
            matrices.add(letter)
        elif place is not None and not is_named(path, ["attention.output.dense"]):
            mlp[place] = True
        else:
            raise ValueError(f"{path}: AdapterHub has LoRA of q, k, v and of the MLP only")
    return {"attn_matrices": sorted(matrices), "selfattn_lora": bool(matrices), **mlp}
