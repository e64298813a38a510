"""lora_grouped_linear and its backward, made of kernels. Nothing waits for ends on the host.

===========  ==========================================  ==========================================
algorithm    forward                                     backward
===========  ==========================================  ==========================================
``fused``    grouped_shrink, grouped_gemm                grouped_shrink, grouped_gemm, grouped_grad
``addmm``    grouped_shrink, PyTorch's product, to       grouped_shrink, PyTorch's product, to
             which grouped_expand adds                   which grouped_expand adds, grouped_grad
===========  ==========================================  ==========================================

PyTorch's product of a stack of experts is grouped_mm. It takes bfloat16 with strides of whole 16
bytes on sm_90 and sm_100. Elsewhere it waits for ends on the host, or refuses, so there ``addmm``
multiplies experts as ``fused`` does. Gradients of weight and bias, which LoRA leaves frozen, are
products of PyTorch, or of grouped_grad for experts. With index, dx sums rows in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch.tma import is_tma_compliant, rows_fit_tma
from lora_kernels.kernels import records
from lora_kernels.kernels.config import target_of
from lora_kernels.kernels.grouped_expand import grouped_expand
from lora_kernels.kernels.grouped_gemm import grouped_gemm
from lora_kernels.kernels.grouped_grad import grouped_grad
from lora_kernels.kernels.grouped_reduce import grouped_reduce, members_of
from lora_kernels.kernels.grouped_shrink import grouped_shrink
from lora_kernels.kernels.launch import as_rows, on_device_of
from lora_kernels.kernels.numerics import Numerics, numerics_of
from lora_kernels.kernels.segments import (
    GroupMask,
    Routing,
    group_mask,
    numbers_of,
    with_unit_rows,
)
from lora_kernels.spec import GroupedSpec, Needs

__all__ = ["lora_grouped_linear_backward", "lora_grouped_linear_forward"]


def lora_grouped_linear_forward(
    algorithm: str,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    groups: Tensor | None,
    index: Tensor | None,
    seeds: Tensor | None,
    spec: GroupedSpec,
) -> tuple[Tensor, Tensor]:
    """reference.grouped_linear.lora_grouped_linear_forward by algorithm "fused" or "addmm"."""
    routing = _routing(x, w, ends, groups, index)
    numerics = numerics_of(x, a, b, narrow=spec.narrow)
    x, a, b = as_rows(x), with_unit_rows(a), with_unit_rows(b)
    bias = None if bias is None else bias.contiguous()
    with on_device_of(x):
        numbers = numbers_of(spec, a.shape[0], x.device)
        records.hold(*numbers)
        mask = group_mask(spec, seeds, numbers)
        h = grouped_shrink(x, a, True, routing, mask, numbers.keep, torch.float32, numerics)
        y = _product_and_update(
            algorithm, x, w.mT, bias, h, b, True, routing, None, numbers.scaling, numerics
        )
    return y, h


def lora_grouped_linear_backward(
    algorithm: str,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    groups: Tensor | None,
    index: Tensor | None,
    seeds: Tensor | None,
    sources: int,
    spec: GroupedSpec,
    needs: Needs,
) -> list[Tensor]:
    """reference.grouped_linear.lora_grouped_linear_backward by algorithm "fused" or "addmm"."""
    of_dy = _routing(dy, w, ends, groups, None)
    of_x, count = of_dy._replace(x_index=index), a.shape[0]
    numerics = numerics_of(dy, a, b, narrow=spec.narrow)
    dy, x, a, b = as_rows(dy), as_rows(x), with_unit_rows(a), with_unit_rows(b)
    dx = dw = da = db = dbias = None
    with on_device_of(dy):
        numbers = numbers_of(spec, count, dy.device)
        records.hold(*numbers)
        mask = group_mask(spec, seeds, numbers)
        if needs.x or needs.a:
            scales = numbers.scaling_keep
            dh = grouped_shrink(dy, b, False, of_dy, None, scales, numerics.dh, numerics)
        if needs.x:
            dx = _product_and_update(
                algorithm, dy, w, None, dh, a, False, of_dy, mask, None, numerics
            )
            if index is not None:
                dx = grouped_reduce(dx, members_of(index, sources), None, dx.dtype)
        if needs.w:
            dw = _grad_w(dy, x, w, of_x)
        if needs.a:
            da = grouped_grad(dh, x, count, of_x, mask, None, a.dtype, numerics)
        if needs.b:
            scales = numbers.scaling
            db = grouped_grad(h.contiguous(), dy, count, of_dy, None, scales, b.dtype, numerics)
            db = db.mT.contiguous()
        if needs.bias and w.dim() == 2:
            dbias = dy.sum(0)
        elif needs.bias:
            ones = dy.new_ones((dy.shape[0], 1))
            dbias = _grad_of_experts(ones, dy, w.shape[0], of_dy).squeeze(1)
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]


def _routing(
    x: Tensor, w: Tensor, ends: Tensor, groups: Tensor | None, index: Tensor | None
) -> Routing:
    rows = x.shape[0] if index is None else index.shape[0]
    ends, groups, index = (None if t is None else t.contiguous() for t in (ends, groups, index))
    return Routing(ends, groups, index, rows, 1 if w.dim() == 2 else ends.shape[0] // w.shape[0])


def _product_and_update(
    algorithm: str,
    left: Tensor,
    w: Tensor,
    bias: Tensor | None,
    update_left: Tensor,
    right: Tensor,
    transposed: bool,
    routing: Routing,
    mask: GroupMask | None,
    scales: Tensor | None,
    numerics: Numerics,
) -> Tensor:
    """left·w_e + bias_e + mask ∘ (scale_g·update_left·right_g). Shapes: as in grouped_gemm."""
    experts, w = w.dim() == 3, _with_unit_stride(w)
    update = (update_left, right, transposed)
    if algorithm == "fused" or (experts and not _takes_grouped_mm(left, w)):
        return grouped_gemm(left, w, bias, *update, routing, mask, scales, numerics)
    rows = left if routing.x_index is None else left.index_select(0, routing.x_index)
    if experts:
        out = F.grouped_mm(rows, w, offs=routing.by_expert().ends)
    else:
        out, bias = F.linear(rows, w.T, bias), None
    return grouped_expand(out, *update, experts, bias, routing, mask, scales, numerics)


def _takes_grouped_mm(left: Tensor, w: Tensor) -> bool:
    """Whether grouped_mm multiplies rows of left by experts without waiting for the device."""
    dtypes = {
        "sm_90": (torch.bfloat16,),
        "sm_100": (torch.bfloat16,),
        "interpreter": (torch.float32, torch.bfloat16),
    }
    return (
        hasattr(F, "grouped_mm")
        and left.dtype in dtypes.get(target_of(left.device), ())
        and is_tma_compliant(left, w)
        and rows_fit_tma(w.shape[-1], left)
    )


def _grad_w(dy: Tensor, x: Tensor, w: Tensor, of_x: Routing) -> Tensor:
    """dw_e = dyᵀ·x over the rows of each expert; over all rows if one weight serves them."""
    if w.dim() == 3:
        return _grad_of_experts(dy, x, w.shape[0], of_x)
    return dy.T @ (x if of_x.x_index is None else x.index_select(0, of_x.x_index))


def _grad_of_experts(left: Tensor, right: Tensor, experts: int, routing: Routing) -> Tensor:
    """leftᵀ·right over the rows of each expert [E, .., ..], a whole expert by one program."""
    numerics = numerics_of(right)
    routing = routing.by_expert()
    return grouped_grad(
        left, right, experts, routing, None, None, right.dtype, numerics, chunk_rows=routing.rows
    )


def _with_unit_stride(w: Tensor) -> Tensor:
    """w with a unit stride along a dimension of its matrices; copies only if it has neither."""
    return w if 1 in w.stride()[-2:] else w.contiguous()
