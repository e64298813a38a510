"""PEFT's format: adapter_config.json checked, a layer's lora_A and lora_B converted there and back.

Values and tensors only: no files, no models.

PEFT keeps lora_A [R, in] and lora_B [out, R] of a linear, lora_embedding_A [R, num] and
lora_embedding_B [dim, R] of an embedding, and two convolutions: lora_A [R, in, *kernel] and
lora_B [out, R, 1, ...]. Linear and embedding are LoRALinear's and LoRAEmbedding's own factors.

MergedLinear: E groups of rank r become one linear of rank R = E·r, whose lora_B is block-diagonal.

Convolution, with P = k_1·k_2·...: this package's delta is (lora_B·lora_A).view_as(weight), lora_B
[out·P, m], lora_A [m, in·k_0], m = r·k_0. A filter of the weight, flattened, is P consecutive rows
of the product. So with R = P·m, PEFT's lora_B is lora_B.view(out, R) and its lora_A the block
diagonal of P copies of lora_A. The other way, R filters of P rows each are m = R·P rows of lora_A,
and lora_B is kron(PEFT's lora_B, I_P), both padded with zeros to a multiple of k_0.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.spec import OutputSplits

__all__ = [
    "AdapterConfig",
    "Factors",
    "Record",
    "from_peft",
    "key_names",
    "make_config",
    "parse_config",
    "parse_records",
    "peft_shapes",
    "to_peft",
    "why_not",
]

# Keys of adapter_config.json that say nothing about what the layers compute.
_INFORMATION = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initialisations that leave the base weight as it was; PiSSA, OLoRA, LoftQ and others do not.
_HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, with PEFT's names and defaults.

    restricted: exclude_modules or layers_to_transform leave out some of target_modules.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | list[str]
    bias: str
    use_rslora: bool
    modules_to_save: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    restricted: bool


def parse_config(raw) -> AdapterConfig:
    """The checked content of adapter_config.json, or a ValueError that names the key."""
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    raw = dict(raw)

    def take(key, kinds, default=None):
        value = raw.pop(key, None)
        value = default if value is None else value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{key}: unexpected value {value!r}")
        return value

    def take_names(key, default=None):
        names = take(key, (str, list), default)
        if isinstance(names, list) and not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{key}: must be a list of names, got {names!r}")
        return names

    if take("peft_type", (str,)) != "LORA":
        raise ValueError("peft_type: only 'LORA' can be loaded")
    if raw.pop("init_lora_weights", True) not in _HARMLESS_INIT:
        raise ValueError("init_lora_weights: an initialisation that changes the base weights")
    take("fan_in_fan_out", (bool,), False)  # the modules themselves tell
    bias = take("bias", (str,), "none")
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias: must be 'none', 'all' or 'lora_only', got {bias!r}")
    saved = take_names("modules_to_save", [])
    restricted = [raw.pop(key, None) for key in ("exclude_modules", "layers_to_transform")]
    raw.pop("layers_pattern", None)
    config = AdapterConfig(
        r=take("r", (int,), 8),
        lora_alpha=take("lora_alpha", (int, float), 8),
        lora_dropout=check_dropout(take("lora_dropout", (int, float), 0.0), "adapter"),
        target_modules=take_names("target_modules"),
        bias=bias,
        use_rslora=take("use_rslora", (bool,), False),
        modules_to_save=[saved] if isinstance(saved, str) else saved,
        rank_pattern=take("rank_pattern", (dict,), {}),
        alpha_pattern=take("alpha_pattern", (dict,), {}),
        restricted=any(value not in (None, [], "") for value in restricted),
    )
    for rank in (config.r, *config.rank_pattern.values()):
        check_rank(rank, "adapter")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        check_alpha(alpha, "adapter")
    for key, value in raw.items():
        if key not in _INFORMATION and value not in (None, False, "", [], {}):
            raise ValueError(f"{key}: {value!r} is not supported")
    return config


@dataclasses.dataclass(frozen=True)
class Record:
    """What PEFT's tensors do not say about a layer of this package.

    r: its rank. enable_lora and out_splits: of a LoRAMergedLinear, None for a convolution.
    """

    r: int
    enable_lora: tuple[bool, ...] | None = None
    out_splits: tuple[int, ...] | None = None


def make_config(
    layers: Mapping[str, LoRALayer],
    ranks: Mapping[str, int],
    target_modules: str | list[str],
    bias: str,
    modules_to_save: list[str],
) -> dict:
    """The content of adapter_config.json, from the layers and their ranks in PEFT, by path."""

    def divisor(rank: int, rslora: bool) -> float:
        return math.sqrt(rank) if rslora else rank

    def scaled(layer: LoRALayer, rslora: bool) -> bool:
        return layer.scaling == layer.lora_alpha / divisor(layer.r, rslora)

    use_rslora = all(scaled(layer, True) for layer in layers.values()) and not all(
        scaled(layer, False) for layer in layers.values()
    )
    alphas = {}
    for path, layer in layers.items():
        if scaled(layer, use_rslora) and ranks[path] % layer.r == 0:
            alpha = layer.lora_alpha * divisor(ranks[path] // layer.r, use_rslora)
        else:
            alpha = layer.scaling * divisor(ranks[path], use_rslora)
        alphas[path] = int(alpha) if float(alpha).is_integer() else float(alpha)
    r, lora_alpha = _most_common(ranks.values()), _most_common(alphas.values())
    dropouts = [
        layer.lora_dropout.p for layer in layers.values() if not isinstance(layer, nn.Embedding)
    ]
    return {
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != lora_alpha},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": bias,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": _most_common(dropouts or [0.0]),
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {f"^{re.escape(p)}": rank for p, rank in ranks.items() if rank != r},
        "revision": None,
        "target_modules": target_modules,
        "task_type": None,
        "use_rslora": use_rslora,
    }


def _most_common(values: Iterable):
    return collections.Counter(values).most_common(1)[0][0]


def parse_records(text: str) -> dict[str, Record]:
    """The records by path out of the metadata of a file, or a ValueError that names the path."""
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    records = {}
    for path, fields in raw.items():
        try:
            record = Record(**fields)
            check_rank(record.r, path)
            if record.enable_lora is not None:
                splits = [check_rank(size, path) for size in record.out_splits]
                flags = [bool(flag) for flag in record.enable_lora]
                record = Record(record.r, tuple(flags), tuple(splits))
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
        records[path] = record
    return records


@dataclasses.dataclass(frozen=True)
class Factors:
    """lora_A and lora_B of a layer of this package, and its rank."""

    a: Tensor
    b: Tensor
    r: int


def key_names(module: nn.Module) -> tuple[str, str]:
    """The ends of PEFT's two keys for a module, wrapped or plain."""
    if isinstance(module, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def peft_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of PEFT's two tensors of this rank for a module, wrapped or plain."""
    conv = _conv(module)
    if conv is not None:
        out, _, *kernel = conv.weight.shape
        return (rank, conv.in_channels, *kernel), (out, rank, *(1 for _ in kernel))
    rows, columns = module.weight.shape
    if isinstance(module, nn.Embedding) or _stores_transposed(module):
        rows, columns = columns, rows
    return (rank, columns), (rows, rank)


def why_not(module: nn.Module) -> str | None:
    """Why PEFT's LoRA of this convolution is no change of its weight; None where it is."""
    conv = _conv(module)
    if conv is None:
        return None
    if conv.groups > 1:
        return f"PEFT's lora_A sees all input channels, groups={conv.groups}"
    if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return f"PEFT's lora_A is not dilated, dilation={conv.dilation}"
    unpadded = conv.padding in ("valid", (0,) * len(conv.kernel_size))
    if conv.padding_mode != "zeros" and not unpadded:
        return f"PEFT's lora_A pads with zeros, padding_mode={conv.padding_mode!r}"
    return None


def to_peft(layer: LoRALayer) -> tuple[Tensor, Tensor, Record | None]:
    """PEFT's two tensors of a layer, and what they do not say about it.

    Raises: ValueError for a convolution that PEFT cannot express.
    """
    a, b = (distributed.full_tensor(factor.detach()) for factor in (layer.lora_A, layer.lora_B))
    if isinstance(layer, LoRAMergedLinear):
        record = Record(layer.r, tuple(layer.enable_lora), tuple(layer.out_splits))
        return a, _block_diagonal(b, record), record
    if isinstance(layer, ConvLoRA):
        return *_conv_to_peft(a, b, layer.conv.weight.shape), Record(layer.r)
    return a, b, None


def from_peft(module: nn.Module, a: Tensor, b: Tensor, record: Record | None) -> Factors:
    """The factors of the layer that wraps module, out of PEFT's tensors of the right shapes.

    record: what to_peft gave with them; None for PEFT's own.
    Raises: ValueError where the tensors are not what a layer of this record gives.
    """
    if record is None:
        conv = _conv(module)
        return Factors(a, b, a.shape[0]) if conv is None else _conv_from_peft(a, b)
    _check_record(module, a.shape[0], record)
    if record.enable_lora is not None:
        own_b = torch.cat([b[columns, ranks] for columns, _, ranks in _groups(record)])
        factors = Factors(a, own_b, record.r)
        restored = a, _block_diagonal(own_b, record)
    else:
        shape = _conv(module).weight.shape
        inner, copies = record.r * shape[2], math.prod(shape[3:])
        own_a = a.reshape(a.shape[0], copies, -1)[:inner, 0].contiguous()
        factors = Factors(own_a, b.reshape(shape[0] * copies, inner), record.r)
        restored = _conv_to_peft(factors.a, factors.b, shape)
    if not (torch.equal(restored[0], a) and torch.equal(restored[1], b)):
        raise ValueError(f"the tensors are not those of a layer with {record}")
    return factors


def _check_record(module: nn.Module, rank: int, record: Record) -> None:
    """record fits the module and PEFT's rank, or a ValueError says so."""
    conv = _conv(module)
    if record.enable_lora is None:
        fits = conv is not None and rank == record.r * math.prod(conv.kernel_size)
    else:
        fits = (
            conv is None
            and not isinstance(module, nn.Embedding)
            and rank == record.r * sum(record.enable_lora)
            and len(record.enable_lora) == len(record.out_splits)
            and min(record.out_splits) >= 1
            and sum(record.out_splits) == peft_shapes(module, rank)[1][0]
        )
    if not fits:
        raise ValueError(f"{record} does not fit {type(module).__name__} and rank {rank}")


def _conv(module: nn.Module) -> nn.Module | None:
    """The convolution in module, if it is one, wrapped or plain."""
    if isinstance(module, ConvLoRA):
        return module.conv
    return module if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


def _stores_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight [in, out], as fan_in_fan_out and HF's Conv1D do."""
    return getattr(module, "fan_in_fan_out", not isinstance(module, nn.Linear))


def _groups(record: Record):
    return list(OutputSplits(record.out_splits, record.enable_lora).groups(record.r))


def _block_diagonal(b: Tensor, record: Record) -> Tensor:
    """lora_B of a LoRAMergedLinear as [N, E·r]. Shapes: b [rows of enabled groups, r]."""
    full = b.new_zeros((sum(record.out_splits), record.r * sum(record.enable_lora)))
    for columns, rows, ranks in _groups(record):
        full[columns, ranks] = b[rows]
    return full


def _conv_to_peft(a: Tensor, b: Tensor, weight_shape) -> tuple[Tensor, Tensor]:
    out, channels, *kernel = weight_shape
    copies = math.prod(kernel[1:])
    rank = copies * a.shape[0]
    peft_a = torch.block_diag(*[a] * copies).view(rank, channels, *kernel)
    return peft_a, b.reshape(out, rank, *(1 for _ in kernel))


def _conv_from_peft(a: Tensor, b: Tensor) -> Factors:
    rank, _, first, *rest = a.shape
    copies = math.prod(rest)
    r = math.ceil(rank * copies / first)
    padding = r * first - rank * copies
    own_a = a.reshape(rank * copies, -1)
    own_b = torch.kron(b.reshape(-1, rank), torch.eye(copies, dtype=b.dtype))
    return Factors(
        nn.functional.pad(own_a, (0, 0, 0, padding)), nn.functional.pad(own_b, (0, padding)), r
    )
