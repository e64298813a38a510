"""Factors of a layer, converted to PEFT's form and back.

PEFT keeps lora_A [R, in] and lora_B [out, R] of a linear, lora_embedding_A [R, num] and
lora_embedding_B [dim, R] of an embedding, and two convolutions: lora_A [R, in, *kernel] and
lora_B [out, R, 1, ...]. Linear and embedding are LoRALinear's and LoRAEmbedding's own factors.

LoRAMergedLinear: E groups of rank r become one linear of rank R = E·r, whose lora_B is
block-diagonal.

Convolution, with P = k_1·k_2·...: this package's delta is (lora_B·lora_A).view_as(weight), lora_B
[out·P, m], lora_A [m, in·k_0], m = r·k_0. A filter of the weight, flattened, is P consecutive rows
of the product. So with R = P·m, PEFT's lora_B is lora_B.view(out, R) and its lora_A the block
diagonal of P copies of lora_A.

A Record in the metadata of the file holds what the tensors of these two do not say.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.adapters.formats.adapter import AdapterLayer, rank_of_two_convolutions
from lora_kernels.checks import check_rank
from lora_kernels.model.targets import LayerSpec
from lora_kernels.spec import OutputSplits

__all__ = ["METADATA", "Record", "from_peft", "parse_records", "to_peft"]

METADATA = "lora_kernels"  # what the records are called in the metadata


@dataclass(frozen=True)
class Record:
    """What PEFT's tensors do not say about a layer of this package, as JSON in the metadata.

    r: its rank. enable_lora and out_splits: of a LoRAMergedLinear, None for a convolution.
    """

    r: int
    enable_lora: Sequence[bool] | None = None
    out_splits: Sequence[int] | None = None

    @classmethod
    def of(cls, spec: LayerSpec) -> "Record":
        """The record of a layer with this spec."""
        splits = spec.splits
        return cls(spec.r) if splits is None else cls(spec.r, splits.enabled, splits.sizes)


def parse_records(text: str) -> dict[str, Record]:
    """The records by path. Raises: ValueError that names the path."""
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    records = {}
    for path, fields in raw.items():
        try:
            records[path] = Record(**fields)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
        check_rank(records[path].r, path)
    return records


def from_peft(layer: AdapterLayer, record: Record | None, use_rslora: bool) -> AdapterLayer:
    """Converts a layer with PEFT's factors and spec to this package's.

    record: the one in the file; None if there is none, as for a layer that PEFT saved.
    Raises: ValueError if the factors are not what a layer of this record gives.
    """
    rank, a, b, conv = layer.spec.r, layer.lora_A, layer.lora_B, layer.base.conv
    if record is not None:
        splits, r = _splits(layer, record), record.r
    else:
        splits, r = None, rank if conv is None else rank_of_two_convolutions(rank, conv.kernel_size)
    ratio = math.sqrt(r / rank) if use_rslora else r / rank  # the same scaling at another rank
    alpha = layer.spec.lora_alpha if r == rank else layer.spec.lora_alpha * ratio
    spec = replace(layer.spec, r=r, lora_alpha=alpha, splits=splits)
    if record is None:
        return replace(layer, spec=spec)
    if splits is not None:
        own_a = a
        own_b = torch.cat([b[columns, ranks] for columns, _, ranks in splits.groups(r)])
    elif conv is not None:  # as _splits has found
        first, *rest = conv.kernel_size
        inner, copies = r * first, math.prod(rest)
        own_a = a.reshape(rank, copies, -1)[:inner, 0].contiguous()
        own_b = b.reshape(layer.base.outputs * copies, inner)
    own = replace(layer, spec=spec, lora_A=own_a, lora_B=own_b)
    restored_a, restored_b = to_peft(own)
    if not (torch.equal(restored_a, a) and torch.equal(restored_b, b)):
        raise ValueError(f"the tensors are not those of a layer with {record}")
    return own


def _splits(layer: AdapterLayer, record: Record) -> OutputSplits | None:
    """The groups of a LoRAMergedLinear, None for a convolution; record must fit layer.

    Raises: ValueError if it does not.
    """
    splits, rank = None, None
    if record.enable_lora is not None:
        sizes = () if record.out_splits is None else record.out_splits
        owner = f"metadata {METADATA}"
        splits = OutputSplits.of(layer.base.outputs, record.enable_lora, sizes, owner=owner)
        if layer.base.kind == "linear":
            rank = record.r * splits.count
    elif layer.base.conv is not None:
        rank = record.r * math.prod(layer.base.conv.kernel_size)
    if rank != layer.spec.r:
        raise ValueError(f"{record} does not fit a {layer.base.kind} of rank {layer.spec.r}")
    return splits


def to_peft(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """PEFT's factors of a layer. Shapes: [R, in, ...], [out, R, ...]."""
    a, b, splits = layer.lora_A, layer.lora_B, layer.spec.splits
    if splits is not None:
        diagonal = b.new_zeros((splits.columns, layer.spec.r * splits.count))
        for columns, rows, ranks in splits.groups(layer.spec.r):
            diagonal[columns, ranks] = b[rows]
        return a, diagonal
    if layer.base.conv is not None and not layer.is_two_convolutions:
        kernel = layer.base.conv.kernel_size
        copies = math.prod(kernel[1:])
        rank = copies * a.shape[0]
        peft_a = torch.block_diag(*[a] * copies).view(rank, layer.base.inputs, *kernel)
        return peft_a, b.reshape(layer.base.outputs, rank, *(1 for _ in kernel))
    return a, b
