"""litgpt's lit_model.pth.lora: a state dict under "model", with hyperparameters.yaml beside it.

q_proj, k_proj and v_proj are one layer, attn.qkv, laid out as loralib's MergedLinear: lora_A
[r·E, in] for the E of them that are enabled, lora_B with their rows one after the other. Rows have
Hugging Face's order. Here they are the layers that they are there.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.agreement import agreed
from lora_kernels.adapters.files import naming
from lora_kernels.adapters.formats.adapter import FACTORS, Adapter, Hints
from lora_kernels.adapters.formats.contents import Contents
from lora_kernels.adapters.formats.names import Names
from lora_kernels.adapters.formats.plain import (
    PlainLayer,
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
from lora_kernels.adapters.untold import Untold
from lora_kernels.model.paths import is_named, join, split

__all__ = ["read", "recognises", "write"]

_WEIGHTS, _NUMBERS, _MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
_NAMES = Names("litgpt")
_QKV = ("q_proj", "k_proj", "v_proj")
_FLAGS = ("lora_query", "lora_key", "lora_value")
# Modules that litgpt adapts by one flag: all of a line, in every block.
_GROUPS = {
    "lora_query": ("q_proj",), "lora_key": ("k_proj",), "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",), "lora_mlp": ("gate_proj", "up_proj", "down_proj"),
    "lora_head": ("lm_head",),
}  # fmt: skip
# Not those of GPT-2 and its relatives, whose blocks are called transformer.h.N, too.
_KEY = re.compile(
    r"(transformer\.h\.\d+\.(attn\.(qkv|proj)|mlp\.(experts\.\d+\.)?(fc|fc_1|fc_2|proj))|lm_head)"
    r"\.lora_[AB]"
)


def recognises(contents: Contents) -> bool:
    """Whether it is a pickle of factors under the names of litgpt's layers, and of nothing else."""
    keys = contents.keys
    return contents.kind == "pickle" and bool(keys) and all(map(_KEY.fullmatch, keys))


def read(file: Path, hints: Hints) -> Adapter:
    """The adapter in a file; sizes of heads are those of hints' base, or of model_config.yaml.

    Raises: ValueError, naming file and key, for what is damaged, does not fit together, or cannot
    be understood without --lora-alpha, --enable-lora or --base; OSError.
    """
    state = files.read_state(file, envelope="model")
    found = collect(file, state, dict(zip(FACTORS, FACTORS, strict=True)))
    told = _yaml(file.parent / _NUMBERS)
    alpha = told_alpha(file, file.parent / _NUMBERS, told.get("lora_alpha"), hints.lora_alpha)
    dropout = told.get("lora_dropout", hints.dropout)
    layers, keys, fused = [], {}, []
    for name, parts in found.items():
        a, b = (parts[factor].value for factor in FACTORS)
        place = f"{file}: {parts[FACTORS[0]].key}"
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] % b.shape[1]:
            raise ValueError(f"{place}: {list(a.shape)} does not go with lora_B {list(b.shape)}")
        with naming(place):
            path = _NAMES.to_hf(name)
            if told.get("lora_r", b.shape[1]) != b.shape[1]:
                raise ValueError(f"has rank {b.shape[1]}, {_NUMBERS} says {told['lora_r']}")
            pieces = [(path, a, b)]
            if split(path)[1] == "qkv_proj":
                fused.append(name)
                pieces = _apart(name, split(path)[0], a, b, told, _sizes(file, hints), hints)
        for path, piece_a, piece_b in pieces:
            layers.append(
                make_layer(path, place, piece_a, piece_b, alpha / b.shape[1], dropout=dropout)
            )
            keys[path] = parts
    for hint, _ in hints.enable_lora:
        if not any(not hint or is_named(name, [hint]) for name in fused):
            raise ValueError(
                f"{file}: --enable-lora: no qkv in it is called {hint!r}: leave it out"
            )
    return make_adapter(layers, keys, file.parent / _NUMBERS, file)


def _apart(
    name: str, parent: str, a: Tensor, b: Tensor, told: Mapping, sizes: Sequence[int] | None,
    hints: Hints,
) -> list[tuple[str, Tensor, Tensor]]:  # fmt: skip
    """Path, lora_A and lora_B of each of q_proj, k_proj and v_proj that has any."""
    r, flags = b.shape[1], [told.get(flag) for flag in _FLAGS]
    given = [numbers for hint, numbers in hints.enable_lora if not hint or is_named(name, [hint])]
    for numbers in given:
        if None not in flags:
            agreed(name, "enable_lora", [int(bool(flag)) for flag in flags], [*numbers])
    flags = list(given[-1]) if given else flags
    if None in flags or len(flags) != 3:
        what = f"which of q, k and v it is for, which {_NUMBERS} beside the file would tell"
        raise Untold(what, "--enable-lora 1,0,1", assumed={"enable_lora": (("", (1, 1, 1)),)})
    if sizes is None:
        what = f"how many rows are q's, which {_MODEL} beside the file would tell"
        raise Untold(what, "--base PATH")
    enabled = [i for i, flag in enumerate(flags) if flag]
    rows = [sizes[i] for i in enabled]
    if sum(rows) != b.shape[0] or r * len(enabled) != a.shape[0]:
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)} are not those of "
            f"{', '.join(_QKV[i] for i in enabled)} with {rows} rows"
        )
    parts = zip(enabled, a.split(r), b.split(rows), strict=True)
    return [(join(parent, _QKV[i]), piece_a, piece_b) for i, piece_a, piece_b in parts]


def _sizes(file: Path, hints: Hints) -> list[int] | None:
    """Rows of q_proj, k_proj and v_proj."""
    of_q, of_k = (hints.base.heads_of(name) for name in ("q_proj", "k_proj"))
    if of_q is None or of_k is None:
        model = _yaml(file.parent / _MODEL)
        count, size = model.get("n_head"), model.get("head_size")
        if size is None and count and "n_embd" in model:
            size = model["n_embd"] // count
        if not count or not size:
            return None
        of_q, of_k = (count, size), (model.get("n_query_groups", count), size)
    (q, q_size), (k, k_size) = of_q, of_k
    return [q * q_size, k * k_size, k * k_size]


def _yaml(file: Path) -> dict:
    """Numbers and truth values at the top level of a YAML file; empty if there is none."""
    if not file.is_file():
        return {}
    found = {}
    with naming(file):
        text = file.read_text("utf-8")
    for name, value in re.findall(r"^(\w+):[ ]*(\S+)[ ]*$", text, re.MULTILINE):
        if value in ("true", "false"):
            found[name] = value == "true"
        elif re.fullmatch(r"-?\d+", value):
            found[name] = int(value)
        elif re.fullmatch(r"-?\d*\.\d*(e-?\d+)?|-?\d+e-?\d+", value) and value != ".":
            found[name] = float(value)
    return found


# ---- writing ----


def write(adapter: Adapter, directory: Path, hints: Hints) -> list[str]:
    """Writes lit_model.pth.lora and hyperparameters.yaml; returns lines about them.

    Raises: ValueError for what litgpt does not have: DoRA, and other modules in one block than in
    another; OSError.
    """
    layers = plain_layers(adapter, "litgpt", ("linear",))
    layers, r, padded = of_one_rank(layers)
    layers, scaling, scaled = of_one_scaling(layers)
    blocks: dict[str, dict[str, PlainLayer]] = defaultdict(dict)
    for layer in layers:
        parent, name = split(layer.path)
        blocks[split(parent)[0] if parent else ""][name] = layer
    flags = _flags(blocks)
    state: dict[str, Tensor] = {}
    for block in blocks.values():
        joined = [block[name] for name in _QKV if name in block]
        if joined:
            path = join(split(joined[0].path)[0], "qkv_proj")
            a, b = torch.cat([x.a for x in joined]), torch.cat([x.b for x in joined])
            state |= _entries(_NAMES.from_hf(path), a, b)
        for name, layer in block.items():
            if name not in _QKV:
                state |= _entries(_NAMES.from_hf(layer.path), layer.a, layer.b)
    dropout = max(layer.dropout for layer in layers)
    numbers = {"lora_r": r, "lora_alpha": alpha_of(scaling, r), "lora_dropout": dropout, **flags}
    base = adapter.base_model or "checkpoints/BASE"
    text = "".join(f"{name}: {str(v).lower()}\n" for name, v in numbers.items())
    with files.replacing(directory, (_WEIGHTS, _NUMBERS)) as scratch:
        files.write_pickle(scratch / _WEIGHTS, state, envelope="model")
        (scratch / _NUMBERS).write_text(f"checkpoint_dir: {base}\n{text}")
    lines = [f"{directory}: LoRA on {len(layers)} modules for litgpt", *padded, *scaled]
    lines.append("remark: litgpt merge_lora wants the checkpoint's model_config.yaml and tokenizer")
    return [*lines, *left_out(adapter, "litgpt", dropout=False)]


def _entries(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {join(name, FACTORS[0]): a, join(name, FACTORS[1]): b}


def _flags(blocks: Mapping[str, Mapping[str, PlainLayer]]) -> dict[str, bool]:
    """litgpt's flags. Raises: ValueError if they do not tell which modules of a block have LoRA."""
    flags = {}
    for flag, names in _GROUPS.items():
        wanted = any(name in block for block in blocks.values() for name in names)
        flags[flag] = wanted
        for parent, block in blocks.items():
            is_head = parent == "" or not re.search(r"\d", parent)
            if wanted and is_head == (flag == "lora_head"):
                missing = [name for name in names if name not in block]
                if missing:
                    raise ValueError(
                        f"{parent}: {missing[0]} has no LoRA, which litgpt cannot express: "
                        f"{flag} is for {', '.join(names)} of every block"
                    )
    return flags
