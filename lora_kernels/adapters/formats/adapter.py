"""The neutral Adapter: what every format is read into and written from.

Factors have the shapes of this package's layers; E is the number of enabled groups, or 1:

* linear: lora_A [E·r, in], lora_B [rows, r], a row for each column of an enabled group; with DoRA
  lora_magnitude [out] besides;
* embedding: lora_A [r, num], lora_B [dim, r];
* convolution: lora_A [r·k_0, in·k_0], lora_B [out/groups·k_1·..., r·k_0]; or, as in most
  formats, a convolution by lora_A [R, in, *kernel] and one by lora_B [out, R, 1, ...];
* experts: a layer for each stack of weights, whose path is the parameter's; lora_A [E, r, in],
  lora_B [E, out, r].

Other entries have the keys that the plain model's state_dict() has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_kernels.adapters.formats.base import UNKNOWN, Base
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.model.paths import join
from lora_kernels.model.targets import LayerSpec
from lora_kernels.quantization import frozen_weight, is_quantised

__all__ = [
    "FACTORS", "MAGNITUDE", "Adapter", "AdapterLayer", "BaseModule", "Convolution", "Hints", "Kind",
    "Source",
    "own_factors", "rank_of_two_convolutions", "renamed",
]  # fmt: skip

Kind = Literal["linear", "embedding", "convolution", "experts"]
FACTORS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude"


# ---- what a layer changes ----


@dataclass(frozen=True)
class Convolution:
    """The options of a convolution, except its channels; padded: whether it pads at all."""

    kernel_size: tuple[int, ...]
    groups: int = 1
    dilation: tuple[int, ...] = (1, 1, 1)
    padded: bool = False
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> "Convolution":
        """The options of an nn.Conv1d, nn.Conv2d or nn.Conv3d."""
        padded = conv.padding not in ("valid", (0,) * len(conv.kernel_size))
        return cls(conv.kernel_size, conv.groups, conv.dilation, padded, conv.padding_mode)

    def not_two_convolutions(self) -> str | None:
        """Why no change of weight equals convolutions by lora_A and lora_B; None if one does."""
        if self.groups > 1:
            return f"lora_A as a convolution sees all input channels, groups={self.groups}"
        if any(d > 1 and k > 1 for d, k in zip(self.dilation, self.kernel_size, strict=False)):
            return f"lora_A as a convolution is not dilated, dilation={self.dilation}"
        if self.padded and self.padding_mode != "zeros":
            return f"lora_A as a convolution pads with zeros, padding_mode={self.padding_mode!r}"
        return None


@dataclass(frozen=True)
class BaseModule:
    """The plain module that a layer changes; inputs, outputs: num, dim of an embedding."""

    kind: Kind
    inputs: int
    outputs: int
    fan_in_fan_out: bool = False
    conv: Convolution | None = None

    @classmethod
    def of(cls, module: ForeignModule) -> "BaseModule":
        """The description of a linear, an embedding or a convolution, plain or wrapped."""
        conv = module.conv if isinstance(module, ConvLoRA) else module
        if isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            outline = Convolution.of(conv)
            return cls("convolution", conv.in_channels, conv.out_channels, conv=outline)
        if isinstance(module, nn.Embedding):
            return cls("embedding", module.num_embeddings, module.embedding_dim)
        if isinstance(module, LoRAQuantizedLinear):
            return cls("linear", module.in_features, module.out_features)
        if is_quantised(module):
            rows, columns = frozen_weight(module).shape
            return cls("linear", columns, rows)
        # The one linear that is not an nn.Linear, Hugging Face's Conv1D, stores [in, out].
        if isinstance(module, nn.Linear):
            transposed = getattr(module, "fan_in_fan_out", False)
            return cls("linear", module.in_features, module.out_features, transposed)
        columns, rows = module.weight.shape
        return cls("linear", columns, rows, True)


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """What an adapter holds for one module; for the shapes of lora_A and lora_B see the top.

    spec is that of this package's layer, even if the factors are those of two convolutions.
    """

    path: str
    base: BaseModule
    spec: LayerSpec
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None = None

    @property
    def is_two_convolutions(self) -> bool:
        """Whether the factors are those of two convolutions."""
        return self.base.kind == "convolution" and self.lora_A.dim() > 2


def rank_of_two_convolutions(rank: int, kernel_size: tuple[int, ...]) -> int:
    """r of this package's convolution that holds two convolutions of this rank, see own_factors."""
    first, *rest = kernel_size
    return math.ceil(rank * math.prod(rest) / first)


def own_factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as this package's layer has them.

    With P = k_1·k_2·..., a filter of the weight is P consecutive rows of lora_B·lora_A. So the R
    filters of two convolutions are R·P rows of lora_A, and lora_B is kron(theirs, I_P), both padded
    with zeros to a multiple of k_0.
    """
    a, b = layer.lora_A, layer.lora_B
    if not layer.is_two_convolutions:
        return a, b
    rank, _, first, *rest = a.shape
    copies = math.prod(rest)
    padding = layer.spec.r * first - rank * copies
    own_a = a.reshape(rank * copies, -1)
    own_b = torch.kron(b.reshape(-1, rank), torch.eye(copies, dtype=b.dtype))
    pad = nn.functional.pad
    return pad(own_a, (0, 0, 0, padding)), pad(own_b, (0, padding))


# ---- the adapter ----


@dataclass(frozen=True)
class Source:
    """The files of an adapter, for errors; key: the key in weights of an entry."""

    config: Path
    weights: Path
    key: Callable[[str], str]

    def place(self, entry: str) -> str:
        """The file and the key in it that hold an entry of the adapter: path.lora_A, head.bias."""
        return f"{self.weights}: {self.key(entry)}"


@dataclass(frozen=True, eq=False)
class Adapter:
    """What LoRA has trained of a model.

    layers: by path, in the order of the model. entries: all other tensors of the adapter: biases,
    the whole of every module in modules_to_save, embeddings of a new vocabulary. bias: the argument
    of mark_only_lora_as_trainable that made the biases trainable. modules_to_save: paths, or ends
    of paths. target_modules, target_parameters: what gets the layers, as in apply_lora.
    restricted: whether target_modules may match further modules, which get no layer. base_model:
    the model's name. base_class: what a library makes of that name. keeps_ties: whether modules
    that are tied to modules_to_save stay so, and LoRA of those tied to target_modules is in layers,
    too. trains_b: whether lora_B trains. source: the files; None if the adapter comes from a model.
    notes: what reading them had to assume, in sentences for the user. lora_biases: by path, what
    adds to the bias of the model's own module, times the scaling.
    """

    layers: Mapping[str, AdapterLayer]
    entries: Mapping[str, Tensor]
    bias: str
    modules_to_save: list[str]
    target_modules: str | list[str]
    target_parameters: Sequence[str] = ()
    restricted: bool = False
    base_model: str | None = None
    base_class: type | None = None
    keeps_ties: bool = False
    trains_b: bool = True
    source: Source | None = None
    notes: Sequence[str] = ()
    lora_biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def read_from(self) -> Source:
        """The files of an adapter that was read."""
        if self.source is None:
            raise ValueError("the adapter comes from a model, not from files")
        return self.source

    @property
    def stacks(self) -> list[str]:
        """The paths of the layers that are stacks of the weights of experts."""
        return [path for path, layer in self.layers.items() if layer.base.kind == "experts"]

    @property
    def use_dora(self) -> bool:
        """Whether a layer has a magnitude."""
        return any(layer.spec.use_dora for layer in self.layers.values())


def renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """adapter with rename(entry) for every path and entry; its layers are the targets then.

    Raises: ValueError if two get the same name.
    """
    source = adapter.source
    old: dict[str, str] = {}
    for entry in (*adapter.layers, *adapter.entries):
        if old.setdefault(rename(entry), entry) != entry:
            raise ValueError(f"{entry} and {old[rename(entry)]} are both {rename(entry)!r}")
    names = (*FACTORS, MAGNITUDE)
    factors = {join(new, name): join(path, name) for new, path in old.items() for name in names}
    keys = factors | old
    return replace(
        adapter,
        layers={rename(p): replace(layer, path=rename(p)) for p, layer in adapter.layers.items()},
        entries={rename(entry): value for entry, value in adapter.entries.items()},
        lora_biases={rename(path): value for path, value in adapter.lora_biases.items()},
        modules_to_save=[rename(name) for name in adapter.modules_to_save],
        target_modules=[rename(path) for path in adapter.layers],
        restricted=True,
        source=source
        and Source(source.config, source.weights, lambda new: source.key(keys.get(new, new))),
    )


@dataclass(frozen=True)
class Hints:
    """What a file may lack about its adapter: the options of ``lora-kernels convert``.

    enable_lora, out_splits: pairs of the name of a module, or the end of its path, and the numbers
    for it; "" stands for all modules. embedding, modules_to_save: names. drop_prefix: what no
    key of the model begins with. base: what is known of the base model.
    """

    lora_alpha: float | None = None
    lora_dropout: float | None = None
    fan_in_fan_out: bool = False
    enable_lora: tuple[tuple[str, tuple[int, ...]], ...] = ()
    out_splits: tuple[tuple[str, tuple[int, ...]], ...] = ()
    embedding: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    drop_prefix: str = ""
    base: Base = UNKNOWN

    @property
    def dropout(self) -> float:
        """lora_dropout of layers if no file tells it."""
        return 0.0 if self.lora_dropout is None else self.lora_dropout
