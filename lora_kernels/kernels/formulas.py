"""What each launcher computes on its operands, in plain PyTorch in a given dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.operands import GroupedOperands, Operands
from lora_kernels.reference.dequantize import dense_4bit


def shrink(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """h."""
    return (o.x.to(dtype) * o.mask.to(dtype) @ o.a.to(dtype).T * o.keep_scale,)


def gemm_fwd(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """y, out of o.h."""
    return (_base(o, dtype) + _update(o, o.h, dtype),)


def gemm_small_m(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and h."""
    (h,) = shrink(o, dtype)
    return _base(o, dtype) + _update(o, h, dtype), h


def expand_y(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """y without x·wᵀ."""
    return (_update(o, o.h, dtype) + (0 if o.bias is None else o.bias.to(dtype)),)


def expand_add_y(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """o.dy, taken for what a layer left in y, and the update."""
    return (o.dy.to(dtype) + _update(o, o.h, dtype),)


def gemm_fwd_scaled(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """y with col_scale, out of o.h."""
    return (_scaled(o, _product(o, dtype) + _update(o, o.h, dtype), dtype),)


def gemm_small_m_scaled(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y with col_scale, and h."""
    (h,) = shrink(o, dtype)
    return _scaled(o, _product(o, dtype) + _update(o, h, dtype), dtype), h


def expand_scale_y(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """o.dy, taken for what a large product left in y, and the update, with col_scale and bias."""
    return (_scaled(o, *expand_add_y(o, dtype), dtype),)


def expand_split_y(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """c out of o.dy, and what x·wᵀ lacks to be y."""
    (c,) = expand_add_y(o, dtype)
    return c, _scaled(o, c, dtype) - o.dy.to(dtype)


def expand_mask_dx(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """o.x, taken for what a large product left in dx, and dh·a, both masked."""
    return (o.mask.to(dtype) * (o.x.to(dtype) + o.dh.to(dtype) @ o.a.to(dtype)),)


def grad_b_scaled(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dh and db with col_scale, out of o.h.

    col_scale∘b stands for b, in b's dtype unless dtype is float64.
    """
    scaled = o.col_scale.to(dtype)
    b = o.b.to(dtype) * scaled[:, None]
    b = b if dtype == torch.float64 else b.to(o.b.dtype).to(dtype)
    dh = o.dy.to(dtype) @ b * (o.spec.scaling * o.keep_scale)
    db = o.dy.to(dtype).T @ o.h.to(dtype) * (o.spec.scaling * scaled[:, None])
    return dh, db


def column_sums(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """The sums out of o.kept."""
    z = o.kept.to(dtype) - (0 if o.bias is None else o.bias.to(dtype))
    return ((o.dy.to(dtype) * z).sum(0),)


def apply_dropout(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """x_hat."""
    return (o.x.to(dtype) * o.mask.to(dtype) * o.keep_scale,)


def grad_b(o: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dh and db, out of o.h."""
    dh, db = torch.empty_like(o.h, dtype=dtype), torch.empty_like(o.b, dtype=dtype)
    for columns, rows, ranks in o.groups():
        dy = o.dy[:, columns].to(dtype)
        dh[:, ranks] = dy @ o.b[rows].to(dtype) * (o.spec.scaling * o.keep_scale)
        db[rows] = dy.T @ o.h[:, ranks].to(dtype) * o.spec.scaling
    return dh, db


def gemm_bwd(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """dx, out of o.dh."""
    (update,) = expand_dx(o, dtype)
    return (o.dy.to(dtype) @ o.w.to(dtype) + update,)


def expand_dx(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """dx without dy·w, out of o.dh."""
    return (o.mask.to(dtype) * (o.dh.to(dtype) @ o.a.to(dtype)),)


def grad_a(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """da, out of o.dh."""
    return (o.dh.to(dtype).T @ (o.x.to(dtype) * o.mask.to(dtype)),)


def dequantize_4bit(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """The dense weight of o.four_bit."""
    return (dense_4bit(o.four_bit, dtype, dtype),)


def weight_norm(o: Operands, dtype: torch.dtype) -> tuple[Tensor]:
    """The norms of the rows of w + scaling·b·a."""
    total = o.w.to(dtype) + o.b.to(dtype) @ o.a.to(dtype) * o.spec.scaling
    return (torch.linalg.vector_norm(total, dim=1),)


def grouped_shrink_h(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """h; 0 in rows without a group."""
    x, h = o.x_rows().to(dtype), torch.zeros_like(o.h, dtype=dtype)
    for segment, rows, g in _with_group(o):
        scale = dropout.keep_scale(o.spec.dropout_p(g))
        h[rows] = x[rows] * o.mask(segment).to(dtype) @ o.a[g].to(dtype).T * scale
    return (h,)


def grouped_shrink_dh(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """dh; 0 in rows without a group."""
    dh = torch.zeros_like(o.h, dtype=dtype)
    for _, rows, g in _with_group(o):
        scale = o.spec.scaling(g) * dropout.keep_scale(o.spec.dropout_p(g))
        dh[rows] = o.dy[rows].to(dtype) @ o.b[g].to(dtype) * scale
    return (dh,)


def grouped_expand_y(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """y, out of o.h and of o.y, which experts have written for their rows alone."""
    return (_with_update_y(o, _of_experts(o, o.y.to(dtype), o.bias), dtype),)


def grouped_expand_dx(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """dx, out of o.dh and o.dx."""
    return (_with_update_dx(o, _of_experts(o, o.dx.to(dtype), None), dtype),)


def grouped_gemm_y(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """y, out of o.h."""
    return (_with_update_y(o, _grouped_base(o, o.x_rows(), o.w.mT, o.bias, dtype), dtype),)


def grouped_gemm_dx(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """dx of the rows of the batch, out of o.dh."""
    return (_with_update_dx(o, _grouped_base(o, o.dy, o.w, None, dtype), dtype),)


def grouped_grad_a(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """da, out of o.dh; 0 for a group without rows."""
    x, da = o.x_rows().to(dtype), torch.zeros_like(o.a, dtype=dtype)
    for segment, rows, g in _with_group(o):
        da[g] += o.dh[rows].to(dtype).T @ (x[rows] * o.mask(segment).to(dtype))
    return (da,)


def grouped_grad_b(o: GroupedOperands, dtype: torch.dtype) -> tuple[Tensor]:
    """dbᵀ, out of o.h; 0 for a group without rows."""
    db = torch.zeros_like(o.b.mT, dtype=dtype)
    for _, rows, g in _with_group(o):
        db[g] += o.h[rows].to(dtype).T @ o.dy[rows].to(dtype) * o.spec.scaling(g)
    return (db,)


def _with_group(o: GroupedOperands):
    """The segments that have rows and a group, with both."""
    return [(s, s.rows, s.group) for s in o.segments() if s.group >= 0]


def _of_experts(o: GroupedOperands, out: Tensor, bias: Tensor | None) -> Tensor:
    """A copy of out; with experts the bias is added, and the rows of none are 0."""
    if not o.experts:
        return out.clone()
    whole = torch.zeros_like(out)
    for segment in o.segments():
        more = 0 if bias is None else bias[segment.expert].to(out.dtype)
        whole[segment.rows] = out[segment.rows] + more
    return whole


def _grouped_base(
    o: GroupedOperands, left: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """left·w_e + bias_e; with experts 0 in the rows of none."""
    left, w = left.to(dtype), w.to(dtype)
    if not o.experts:
        return left @ w + (0 if bias is None else bias.to(dtype))
    out = left.new_zeros(len(left), w.shape[-1])
    for segment in o.segments():
        out[segment.rows] = left[segment.rows] @ w[segment.expert]
    return _of_experts(o, out, bias)


def _with_update_y(o: GroupedOperands, out: Tensor, dtype: torch.dtype) -> Tensor:
    """out + s_g·h·b_gᵀ."""
    for _, rows, g in _with_group(o):
        out[rows] += o.h[rows].to(dtype) @ o.b[g].to(dtype).T * o.spec.scaling(g)
    return out


def _with_update_dx(o: GroupedOperands, out: Tensor, dtype: torch.dtype) -> Tensor:
    """out + mask∘(dh·a_g)."""
    for segment, rows, g in _with_group(o):
        out[rows] += o.mask(segment).to(dtype) * (o.dh[rows].to(dtype) @ o.a[g].to(dtype))
    return out


def _base(o: Operands, dtype: torch.dtype) -> Tensor:
    return F.linear(o.x.to(dtype), o.w.to(dtype), None if o.bias is None else o.bias.to(dtype))


def _product(o: Operands, dtype: torch.dtype) -> Tensor:
    return F.linear(o.x.to(dtype), o.w.to(dtype))


def _scaled(o: Operands, y: Tensor, dtype: torch.dtype) -> Tensor:
    """col_scale∘y + bias."""
    return y * o.col_scale.to(dtype) + (0 if o.bias is None else o.bias.to(dtype))


def _update(o: Operands, h: Tensor, dtype: torch.dtype) -> Tensor:
    """scaling·h·bᵀ over all columns of y; zero in a disabled group."""
    out = h.new_zeros(len(h), o.spec.splits.columns, dtype=dtype)
    for columns, rows, ranks in o.groups():
        out[:, columns] = h[:, ranks].to(dtype) @ o.b[rows].to(dtype).T * o.spec.scaling
    return out
