"""What each launcher computes on Operands of one layer, in plain PyTorch in a given dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.kernels.operands import Operands


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


def _base(o: Operands, dtype: torch.dtype) -> Tensor:
    return F.linear(o.x.to(dtype), o.w.to(dtype), None if o.bias is None else o.bias.to(dtype))


def _update(o: Operands, h: Tensor, dtype: torch.dtype) -> Tensor:
    """scaling·h·bᵀ over all columns of y; zero in a disabled group."""
    out = h.new_zeros(len(h), o.spec.splits.columns, dtype=dtype)
    for columns, rows, ranks in o.groups():
        out[:, columns] = h[:, ranks].to(dtype) @ o.b[rows].to(dtype).T * o.spec.scaling
    return out
