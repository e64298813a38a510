"""What the formats of other tools share: a layer as most tools have it, read and written.

The update is scaling·B·A, with A [r, in, ...] and B [out, r, ...]. A convolution is two of them, a
LoRAMergedLinear one layer whose B is block-diagonal.
"""

import collections
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.adapters import files
from lora_kernels.adapters.formats.adapter import (
    FACTORS,
    Adapter,
    AdapterLayer,
    BaseModule,
    Convolution,
    Hints,
    Kind,
    Source,
    rank_of_two_convolutions,
)
from lora_kernels.adapters.formats.keys import stripped
from lora_kernels.adapters.formats.peft_factors import to_peft
from lora_kernels.adapters.untold import ALPHA, Untold
from lora_kernels.checks import check_alpha, check_dropout
from lora_kernels.model.paths import join, split
from lora_kernels.model.targets import LayerSpec

__all__ = [
    "EMBEDDINGS", "Part", "PlainLayer", "alpha_of", "base_weights", "collect", "left_out",
    "make_adapter", "make_layer", "of_one_rank", "of_one_scaling", "plain_layers", "scale_of",
    "single_alpha", "summary", "told_alpha",
]  # fmt: skip

# Names of embeddings in models, for formats whose shapes do not tell them from linears.
EMBEDDINGS = ("embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings", "embeddings")


# ---- reading ----


@dataclass(frozen=True)
class Part:
    """A tensor of a file, with its key."""

    key: str
    value: Tensor


def collect(
    file: Path, tensors: Mapping[str, Tensor], endings: dict[str, str]
) -> dict[str, dict[str, Part]]:
    """The parts of each layer by path, in the order of the file.

    endings: end of a key -> name of the part. Names of wrappers are taken off the paths.
    Raises: ValueError, naming file and key, for a key with another end, for two that become one,
    for factors without two dimensions, and for a layer that lacks one of them.
    """
    strip, _ = stripped(tensors)
    layers: dict[str, dict[str, Part]] = {}
    for key, value in tensors.items():
        plain = strip(key)
        found = [end for end in endings if plain.endswith(f".{end}")]
        if not found:
            ends = ", ".join(endings)
            raise ValueError(f"{file}: {key}: must end with one of {ends}")
        end = max(found, key=len)
        if value.dtype not in files.FLOATS:
            raise ValueError(f"{file}: {key}: dtype must be floating, got {value.dtype}")
        if endings[end] in FACTORS and (value.dim() < 2 or 0 in value.shape):
            shape = list(value.shape)
            raise ValueError(f"{file}: {key}: must be a matrix with numbers in it, got {shape}")
        parts = layers.setdefault(plain.removesuffix(f".{end}"), {})
        if endings[end] in parts:
            raise ValueError(f"{file}: {key}: is there twice, also as {parts[endings[end]].key}")
        parts[endings[end]] = Part(key, value)
    names = {part: end for end, part in reversed(endings.items())}
    for path, parts in layers.items():
        for name in FACTORS:
            if name not in parts:
                other = next(iter(parts.values())).key
                raise ValueError(f"{file}: {path}.{names[name]}: missing, though {other} is there")
    if not layers:
        raise ValueError(f"{file}: holds no factors of LoRA")
    return layers


def scale_of(
    file: Path, path: str, parts: Mapping[str, Part], name: str, hint: float | None
) -> float:
    """alpha / r of a layer, by the part of this name, or else by the hint.

    Raises: ValueError that names file and key, and for both at once. 0 counts as absent: the tools
    take it for r.
    """
    r = parts[FACTORS[0]].value.shape[0]
    alpha = parts[name].value if name in parts else None
    if alpha is not None and alpha.numel() != 1:
        key = parts[name].key
        raise ValueError(f"{file}: {key}: must be one number, got shape {list(alpha.shape)}")
    if alpha is None or alpha.item() == 0:
        if hint is None:
            what = "missing" if alpha is None else "is 0"
            raise Untold(
                f"{file}: {path}.{name}: {what}, r is {r}", ALPHA, assumed={"lora_alpha": 1.0}
            )
        return check_alpha(hint, "--lora-alpha") / r
    key = parts[name].key
    if hint not in (None, alpha.item()):
        raise ValueError(
            f"{file}: {key}: is {alpha.item():g}, and {hint:g} was given: leave it out"
        )
    return check_alpha(alpha.item(), f"{file}: {key}") / r


def told_alpha(file: Path, config: Path, told: float | None, hint: float | None) -> float:
    """lora_alpha by the config beside a file, or else by the hint.

    Raises: ValueError that names the file for neither, for both if they differ, and for a number
    that is none.
    """
    alpha = hint if told is None else told
    if alpha is None:
        what = f"{file}: no {config.name} beside it tells lora_alpha"
        raise Untold(what, ALPHA, assumed={"lora_alpha": 1.0})
    check_alpha(alpha, f"{file}: lora_alpha")
    if hint not in (None, alpha):
        raise ValueError(f"{config}: lora_alpha is {alpha:g}, and {hint:g} was given: leave it out")
    return alpha


def make_layer(
    path: str, place: str, a: Tensor, b: Tensor, scaling: float, *, kind: Kind = "linear",
    dropout: float = 0.0, magnitude: Tensor | None = None, hints: Hints | None = None,
) -> AdapterLayer:  # fmt: skip
    """A layer of A [r, in, ...] and B [out, r, ...]; place: file and key, for errors.

    Raises: ValueError if the shapes do not go together.
    """
    if a.dim() != b.dim() or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{place}: A {list(a.shape)} and B {list(b.shape)} must be [r, in, ...] and "
            f"[out, r, ...], here as this package has them"
        )
    r, inputs, outputs = a.shape[0], a.shape[1], b.shape[0]
    if a.dim() > 2 and any(size != 1 for size in b.shape[2:]):
        raise ValueError(f"{place}: B {list(b.shape)} must be a convolution of kernel 1")
    if magnitude is not None and list(magnitude.shape) != [outputs]:
        shape = list(magnitude.shape)
        raise ValueError(f"{place}: the magnitude must have shape {[outputs]}, got {shape}")
    conv = Convolution(tuple(a.shape[2:])) if a.dim() > 2 else None
    transposed = kind == "linear" and conv is None and hints is not None and hints.fan_in_fan_out
    own = r if conv is None else rank_of_two_convolutions(r, conv.kernel_size)
    base = BaseModule(kind if conv is None else "convolution", inputs, outputs, transposed, conv)
    dropout = 0.0 if kind == "embedding" else check_dropout(dropout, place)
    spec = LayerSpec(own, alpha_of(scaling, own), scaling, dropout, use_dora=magnitude is not None)
    return AdapterLayer(path, base, spec, a, b, magnitude)


def alpha_of(scaling: float, r: int) -> float:
    """lora_alpha with lora_alpha / r == scaling, a whole number if one has it."""
    alpha = scaling * r
    whole = round(alpha) if math.isfinite(alpha) else alpha
    return check_alpha(whole if whole / r == scaling else alpha, "adapter")


def make_adapter(
    layers: Iterable[AdapterLayer], keys: Mapping[str, Mapping[str, Part]], config: Path,
    file: Path, notes: Sequence[str] = (), base_model: str | None = None,
) -> Adapter:  # fmt: skip
    """The adapter of these layers, which are all that is known of its model.

    keys: the parts in the file, by the paths of the layers. Raises: ValueError for two layers of
    one path.
    """
    by_path: dict[str, AdapterLayer] = {}
    for layer in layers:
        if layer.path in by_path:
            raise ValueError(f"{file}: two layers are {layer.path!r}")
        by_path[layer.path] = layer
    places = {
        join(path, name): part.key for path, parts in keys.items() for name, part in parts.items()
    }
    return Adapter(
        layers=by_path,
        entries={},
        bias="none",
        modules_to_save=[],
        target_modules=sorted(by_path),
        restricted=True,
        base_model=base_model,
        source=Source(config, file, lambda entry: places.get(entry, entry)),
        notes=notes,
    )


def summary(adapter: Adapter) -> list[str]:
    """Lines that say what the layers were taken for."""
    names = collections.defaultdict(list)
    for path, layer in adapter.layers.items():
        kind = layer.base.kind if layer.spec.splits is None else "merged linear"
        sizes = f"{layer.base.inputs} -> {layer.base.outputs}, r={layer.spec.r}"
        dora = ", DoRA" if layer.magnitude is not None else ""
        names[f"{kind} {sizes}, scaling {layer.spec.scaling:.6g}{dora}"].append(path)
    lines = []
    for outline, paths in names.items():
        counts = collections.Counter(split(path)[1] for path in paths)
        lines.append(f"  {outline}: " + ", ".join(f"{name} x{n}" for name, n in counts.items()))
    return lines


# ---- writing ----


@dataclass(frozen=True, eq=False)
class PlainLayer:
    """A layer as most tools have it."""

    path: str
    kind: Kind
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank of A and B."""
        return self.a.shape[0]


def plain_layers(
    adapter: Adapter, tool: str, kinds: Collection[str], dora: bool = False
) -> list[PlainLayer]:
    """The layers of adapter for a tool that has these kinds, with or without DoRA.

    Raises: ValueError that names what the tool has no place for.
    """
    file = f"{adapter.source.weights}: " if adapter.source else ""
    others = [entry for entry in adapter.entries if entry not in base_weights(adapter)]
    for entry in (*others, *(join(path, "lora_B.bias") for path in adapter.lora_biases)):
        raise ValueError(f"{file}{entry}: {tool}'s format has no place but for factors of LoRA")
    layers = []
    for path, layer in adapter.layers.items():
        if layer.base.kind not in kinds:
            kind = layer.base.kind
            raise ValueError(f"{file}{path}: {tool}'s format has no LoRA of the kind {kind!r}")
        if layer.magnitude is not None and not dora:
            raise ValueError(f"{file}{path}: use_dora: {tool}'s format has no DoRA")
        conv = layer.base.conv
        reason = conv and conv.not_two_convolutions()
        if reason is not None:
            raise ValueError(f"{file}{path}: {tool}'s format has no such convolution: {reason}")
        spec = layer.spec
        layers.append(
            PlainLayer(
                path, layer.base.kind, *to_peft(layer), spec.scaling, spec.lora_dropout,
                layer.magnitude,
            )
        )  # fmt: skip
    return layers


def base_weights(adapter: Adapter) -> list[str]:
    """Weights under adapted embeddings and heads, which PEFT saves whether they train or not."""
    return [join(p, "weight") for p in adapter.layers if join(p, "weight") in adapter.entries]


def single_alpha(layer: PlainLayer, alpha: float) -> float:
    """alpha as a float32, for files that have it so.

    Raises: ValueError if that is not finite, or 0, which the tools take for no alpha at all.
    """
    single = torch.tensor(alpha, dtype=torch.float32).item()
    if single == 0 or not math.isfinite(single):
        raise ValueError(
            f"{layer.path}: alpha {alpha!r} is {single!r} as the float32 of this format, which its "
            f"tools do not take"
        )
    return single


def of_one_scaling(
    layers: Sequence[PlainLayer],
    measure: Callable[[PlainLayer], float] = lambda layer: layer.scaling,
) -> tuple[list[PlainLayer], float, list[str]]:
    """Layers whose measure (the scaling, or what follows from it) is the same, which is returned.

    The B of others is multiplied by the ratio, in float64, and rounded once to its dtype. The
    lines say so. Raises: ValueError if one of them is 0, or B leaves the range of its dtype.
    """
    values = [measure(layer) for layer in layers]
    common = collections.Counter(values).most_common(1)[0][0]
    made, changed, exact = [], [], True
    for layer, value in zip(layers, values, strict=True):
        if value != common:
            ratio = value / common if common else 0.0
            exact = exact and math.frexp(ratio)[0] == 0.5
            scaled = (layer.b.double() * ratio).to(layer.b.dtype)
            if (
                not scaled.isfinite().all()
                or not torch.equal(scaled == 0, layer.b == 0)
                or not ratio
            ):
                raise ValueError(
                    f"{layer.path}: scaling {layer.scaling:g}: the format has one scaling for all, "
                    f"and lora_B in {layer.b.dtype} cannot take the ratio {ratio:g} to it"
                )
            layer = replace(layer, b=scaled, scaling=layer.scaling / ratio)
            changed.append(layer.path)
        made.append(layer)
    if not changed:
        return made, common, []
    how = "exactly, by a power of two" if exact else "rounded once to its dtype"
    return made, common, [f"remark: the scaling of {_named(changed)} is in lora_B, {how}"]


def of_one_rank(layers: Sequence[PlainLayer]) -> tuple[list[PlainLayer], int, list[str]]:
    """Layers of the same rank, the largest one: the others are padded with zeros."""
    r = max(layer.r for layer in layers)
    smaller = [layer.path for layer in layers if layer.r < r]
    pad = torch.nn.functional.pad
    made = [
        layer
        if layer.r == r
        else replace(
            layer, a=pad(layer.a, (0, 0, 0, r - layer.r)), b=pad(layer.b, (0, r - layer.r))
        )
        for layer in layers
    ]
    if not smaller:
        return made, r, []
    return made, r, [f"remark: zeros make the rank {r} of {_named(smaller)}"]


def left_out(adapter: Adapter, tool: str, dropout: bool = True) -> list[str]:
    """Lines about what a tool's format does not keep; dropout: whether dropout is part of that."""
    found = {layer.spec.lora_dropout for layer in adapter.layers.values()} - {0.0}
    lines = [f"remark: {entry}, the base model's, is left out" for entry in base_weights(adapter)]
    if dropout and found:
        text = ", ".join(f"{p:g}" for p in sorted(found))
        lines.append(f"remark: {tool}'s format does not keep lora_dropout {text}")
    return lines


def _named(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} others"
