"""What each kernel computes, in plain PyTorch: operands of a launcher, and its formula."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout, reference
from lora_kernels.kernels import launch
from lora_kernels.testing.problem import Problem


class Operands:
    """The matrices of a problem, h in float32, dh, and the mask as it multiplies.

    Kernels take h and dh from each other, as whole matrices; here they are random.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        for name in ("x", "w", "a", "b", "dy", "bias"):
            setattr(self, name, getattr(problem, name))
        shape, device = (len(self.x), len(self.a)), self.x.device
        self.h, self.dh = (torch.randn(shape, device=device) for _ in range(2))
        self.numerics = launch.numerics_of(self.x, self.a, self.b)
        self.dh = self.dh.to(self.numerics.dh)

    @functools.cached_property
    def mask(self) -> Tensor:
        mask = self.problem.mask()
        return torch.ones_like(self.x, dtype=torch.float32) if mask is None else mask.float()

    @property
    def groups(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """out_splits and enable_lora."""
        return tuple(self.problem.out_splits), tuple(self.problem.enable_lora)

    def enabled_groups(self) -> list[tuple[slice, slice, slice]]:
        """(columns of y, rows of b, columns of h) of each enabled group."""
        return list(reference.groups(*self.groups, self.b.shape[1]))


def down(o: Operands, dtype: torch.dtype) -> Tensor:
    keep_scale = dropout.keep_scale(o.problem.dropout_p)
    return o.x.to(dtype) * o.mask.to(dtype) @ o.a.to(dtype).T * keep_scale


def forward(o: Operands, bias: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    return _base(o, bias, dtype) + _low_rank(o, o.h, dtype) * scaling


def few_rows(
    o: Operands, bias: Tensor | None, scaling: float, dtype: torch.dtype, factor: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y in dtype, h in factor."""
    h = down(o, factor)
    return _base(o, bias, dtype) + _low_rank(o, h, dtype) * scaling, h


def dy_pass(
    o: Operands, scale_dh: float, scale_db: float, dtype: torch.dtype, factor: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dh in dtype, db in factor."""
    dh, db = torch.empty_like(o.h, dtype=dtype), torch.empty_like(o.b, dtype=factor)
    for columns, rows, ranks in o.enabled_groups():
        dy = o.dy[:, columns]
        dh[:, ranks] = dy.to(dtype) @ o.b[rows].to(dtype) * scale_dh
        db[rows] = dy.to(factor).T @ o.h[:, ranks].to(factor) * scale_db
    return dh, db


def dx(o: Operands, dtype: torch.dtype) -> Tensor:
    return o.dy.to(dtype) @ o.w.to(dtype) + fill_dx(o, dtype)


def da(o: Operands, dtype: torch.dtype) -> Tensor:
    return o.dh.to(dtype).T @ (o.x.to(dtype) * o.mask.to(dtype))


def fill_y(o: Operands, bias: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    return _low_rank(o, o.h, dtype) * scaling + (0 if bias is None else bias.to(dtype))


def fill_dx(o: Operands, dtype: torch.dtype) -> Tensor:
    return o.mask.to(dtype) * (o.dh.to(dtype) @ o.a.to(dtype))


def _base(o: Operands, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(o.x.to(dtype), o.w.to(dtype), None if bias is None else bias.to(dtype))


def _low_rank(o: Operands, h: Tensor, dtype: torch.dtype) -> Tensor:
    """h·bᵀ over all columns of y; zero where a group is disabled."""
    out = h.new_zeros(len(h), sum(o.problem.out_splits), dtype=dtype)
    for columns, rows, ranks in o.enabled_groups():
        out[:, columns] = h[:, ranks].to(dtype) @ o.b[rows].to(dtype).T
    return out
