"""What the kernels over segments are called with on GroupedOperands, for registry.py."""

import torch
from torch import Tensor

from lora_kernels.kernels import grouped_expand, grouped_gemm, grouped_grad, grouped_shrink
from lora_kernels.kernels.config import GemmConfig, SkinnyConfig
from lora_kernels.kernels.operands import GroupedOperands, copy_of
from lora_kernels.kernels.segments import GroupMask, GroupNumbers, group_mask, numbers_of

Tensors = tuple[Tensor]


def shrink_h(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """h."""
    numbers, mask = _numbers(o)
    options = (mask, numbers.keep, torch.float32, o.numerics, config)
    return (grouped_shrink.grouped_shrink(o.x, o.a, True, o.routing, *options),)


def shrink_dh(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """dh."""
    options = (None, _numbers(o)[0].scaling_keep, o.numerics.dh, o.numerics, config)
    return (grouped_shrink.grouped_shrink(o.dy, o.b, False, o.without_index, *options),)


def expand_y(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """y, added to a copy of o.y."""
    options = (o.without_index, None, _numbers(o)[0].scaling, o.numerics, config)
    bias = o.bias if o.experts else None
    y = copy_of(o.y)
    return (grouped_expand.grouped_expand(y, o.h, o.b, True, o.experts, bias, *options),)


def expand_dx(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """dx, added to a copy of o.dx."""
    options = (o.without_index, _numbers(o)[1], None, o.numerics, config)
    dx = copy_of(o.dx)
    return (grouped_expand.grouped_expand(dx, o.dh, o.a, False, o.experts, None, *options),)


def gemm_y(o: GroupedOperands, config: GemmConfig | None) -> Tensors:
    """y."""
    options = (o.routing, None, _numbers(o)[0].scaling, o.numerics, config)
    return (grouped_gemm.grouped_gemm(o.x, o.w.mT, o.bias, o.h, o.b, True, *options),)


def gemm_dx(o: GroupedOperands, config: GemmConfig | None) -> Tensors:
    """dx of the rows of the batch."""
    options = (o.without_index, _numbers(o)[1], None, o.numerics, config)
    return (grouped_gemm.grouped_gemm(o.dy, o.w, None, o.dh, o.a, False, *options),)


def grad_a(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """da."""
    options = (o.routing, _numbers(o)[1], None, o.a.dtype, o.numerics, config)
    return (grouped_grad.grouped_grad(o.dh, o.x, len(o.a), *options),)


def grad_b(o: GroupedOperands, config: SkinnyConfig | None) -> Tensors:
    """dbᵀ."""
    options = (o.without_index, None, _numbers(o)[0].scaling, o.b.dtype, o.numerics, config)
    return (grouped_grad.grouped_grad(o.h, o.dy, len(o.b), *options),)


def _numbers(o: GroupedOperands) -> tuple[GroupNumbers, GroupMask | None]:
    numbers = numbers_of(o.spec, len(o.a), o.x.device)
    return numbers, group_mask(o.spec, o.seeds, numbers)
