"""A batch whose samples have adapters of their own (adapter_names), on lora_grouped_linear.

PEFT calls every adapter on its samples by itself, and adds to a copy of the result each time.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import functional
from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.guard import NotFused, Operands, misfit, operands_of
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference.linear import shaped_like

__all__ = ["compute_mixed", "mixed_of"]

BASE = "__base__"  # PEFT's name for no adapter


class Segments(NamedTuple):
    """Runs of samples with one adapter: where each ends, in samples, and its adapter's place.

    -1: no adapter of this layer.
    """

    adapters: tuple[str, ...]
    ends: tuple[int, ...]
    groups: tuple[int, ...]


def mixed_of(
    layer: ForeignModule, x: Any, names: Any
) -> tuple[Segments, list[Operands]] | NotFused:
    """What compute_mixed takes of a PEFT lora.Linear, or why PEFT's own forward runs."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return NotFused("adapter_names is not a list of names")
    if not isinstance(x, Tensor) or x.dim() < 2 or len(names) != x.shape[0] or not names:
        return NotFused("adapter_names has not a name for each sample of x")
    held = layer._modules["lora_A"]._modules
    segments = _segments(tuple(names), tuple(name for name in held if name != BASE))
    if not segments.adapters:
        return NotFused("none of adapter_names is an adapter of the layer")
    found: list[Operands] = []
    for name in segments.adapters:
        operands = operands_of(layer, name)
        if isinstance(operands, NotFused):
            return operands
        if isinstance(operands.weight, FrozenWeight):
            return NotFused(
                f"its weight is frozen as {operands.weight.kind}, which one call for "
                f"all adapters does not take"
            )
        if isinstance(operands.scaling, Tensor):
            return NotFused("scaling is a tensor")
        if operands.magnitude is not None:
            return NotFused("one of its adapters has a magnitude (DoRA)")
        if operands.a.dtype != (found or [operands])[0].a.dtype:
            return NotFused("its adapters have several dtypes")
        found.append(operands)
    return misfit(x, found[0]) or (segments, found)


def compute_mixed(x: Tensor, segments: Segments, operands: list[Any]) -> Tensor:
    """The layer's output, by Operands as mixed_of gives them, without frozen weights.

    Shapes: x [samples, ..., K] -> [samples, ..., N].
    """
    weight, bias = operands[0].weight, operands[0].bias
    rows = math.prod(x.shape[1:-1])
    ends = torch.tensor([end * rows for end in segments.ends], dtype=torch.int32, device=x.device)
    y = functional.lora_grouped_linear(
        x.reshape(-1, x.shape[-1]),
        weight,
        [found.a for found in operands],
        [found.b for found in operands],
        ends,
        bias,
        groups=torch.tensor(segments.groups, dtype=torch.int32, device=x.device),
        scaling=[found.scaling for found in operands],
        dropout_p=[found.dropout_p for found in operands],
    )
    return shaped_like(x, y)


@functools.lru_cache(64)
def _segments(names: Sequence[str], held: Sequence[str]) -> Segments:
    """The runs of names; a name that is not held has no adapter, as PEFT has it."""
    adapters = tuple(name for name in dict.fromkeys(names) if name in held)
    place = {name: i for i, name in enumerate(adapters)}
    ends, groups, end = [], [], 0
    for group, run in itertools.groupby(place.get(name, -1) for name in names):
        end += len(list(run))
        ends.append(end)
        groups.append(group)
    return Segments(adapters, tuple(ends), tuple(groups))
