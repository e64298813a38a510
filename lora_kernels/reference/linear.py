"""lora_linear and its backward in plain PyTorch: the specification, the CPU path and the oracle.

Notation: x [M, K] input; w [N, K] base weight; a [E·r, K] and b [rows of the enabled groups, r] the
LoRA factors of E enabled groups of output columns (LoRALinear: one group, E = 1);
x_hat = dropout(x); h = x_hat·aᵀ [M, E·r]; dh = scaling·dy·b [M, E·r]. Low-rank products run in
float32 at least, whatever the dtypes of x, a and b. The large product runs in w's dtype if that is
another than x's, as over a base that multiplies in its own; else products.py says in which.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.reference.products import product_dtype
from lora_kernels.spec import LoraSpec, Needs

__all__ = [
    "accumulate_dtype", "add_update_", "lora_linear_backward", "lora_linear_forward",
    "low_rank_input", "part", "shaped_like",
]  # fmt: skip


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of h and dh: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def low_rank_input(x: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """h = x_hat·aᵀ. Shapes: x [..., K], a [R, K] -> h [M, R] in accumulate_dtype."""
    rows = x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(x.dtype)
    if dropout_p == 0:
        return _as(acc, rows) @ _as(acc, a).T
    factor = _as(acc, a).T
    m, k = rows.shape
    parts = [
        mask.mul_(rows[some]) @ factor for some, mask in dropout.masks(seed, m, k, dropout_p, acc)
    ]
    return _join(parts, dim=0) * dropout.keep_scale(dropout_p)


def lora_linear_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    spec: LoraSpec,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias, plus scaling·h·bᵀ in the columns of each enabled group; h = x_hat·aᵀ.

    Shapes: x [..., K], w [N, K], a [E·r, K], b [rows of the enabled groups, r], bias [N], seed [1]
    -> y [..., N], h [M, E·r] in accumulate_dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    large = product_dtype(x.dtype, x.device, len(rows)) if w.dtype == x.dtype else w.dtype
    converted = _as(large, rows)
    y = F.linear(converted, _as(large, w), None if bias is None else _as(large, bias))
    if large.itemsize < x.dtype.itemsize:
        y, converted = y.to(x.dtype), rows
    h = low_rank_input(converted, a, seed, spec.dropout_p)
    add_update_(y, h, b, spec)
    return shaped_like(x, _as(x.dtype, y)), h


def add_update_(y: Tensor, h: Tensor, b: Tensor, spec: LoraSpec) -> None:
    """y += scaling·h·bᵀ in the columns of each enabled group, in place.

    Shapes: y [M, N], h [M, E·r] in accumulate_dtype, b [rows of the enabled groups, r].
    """
    for columns, b_rows, ranks in spec.splits.groups(b.shape[1]):
        factor = _as(h.dtype, part(b, 0, b_rows)).T
        _add_product_(part(y, 1, columns), part(h, 1, ranks), factor, spec.scaling)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    spec: LoraSpec,
    needs: Needs,
) -> list[Tensor]:
    """The gradients of lora_linear_forward that needs asks for, in its order.

    dx = dy·w + mask∘(dh·a); dw = dyᵀ·x; da = dhᵀ·x_hat; db = scaling·dyᵀ·h;
    dbias = column sums of dy. An operand may be None if no gradient asked for depends on it: dw
    and da depend on x; db on h; dx on w; dx and da on a; dx, da and db on b.
    """
    scaling, dropout_p = spec.scaling, spec.dropout_p
    dy_rows = dy.reshape(-1, dy.shape[-1])
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(dy.dtype)
    large = product_dtype(dy.dtype, dy.device, len(dy_rows), backward=True)
    if w is not None and w.dtype != dy.dtype:
        large = w.dtype
    dx = dw = da = db = dbias = None

    enabled = list(spec.splits.groups(b.shape[1])) if b is not None else []
    # One conversion for all products, if they run in the same dtype.
    converted = _as(large, dy_rows)
    wide_dy = converted if large == acc else dy_rows

    if needs.x or needs.a:
        # b is copied to [r, rows]: BLAS is twice as fast on a skinny factor stored that way.
        dh = _join(
            [
                F.linear(
                    _as(acc, part(wide_dy, 1, columns)),
                    _as(acc, part(b, 0, b_rows)).T.contiguous(),
                )
                for columns, b_rows, _ in enabled
            ],
            dim=1,
        )
        dh = dh * (scaling * dropout.keep_scale(dropout_p))
    update = None
    if dropout_p > 0 and (needs.x or needs.a):
        update = dh @ _as(acc, a) if needs.x else None
        for some, mask in dropout.masks(seed, dy_rows.shape[0], a.shape[1], dropout_p, acc):
            if needs.x:
                update[some].mul_(mask)
            if needs.a:
                da_part = dh[some].T @ mask.mul_(rows[some])
                da = da_part if da is None else da.add_(da_part)
    elif needs.a:
        da = dh.T @ _as(acc, rows)
    if needs.x:
        if update is not None and large == acc:  # in update's memory
            dx = update.addmm_(converted, _as(large, w))
        else:
            dx = converted @ _as(large, w)
            if large.itemsize < acc.itemsize:
                dx = _as(dy.dtype, dx)
            if update is None:
                _add_product_(dx, dh, _as(acc, a), 1.0)
            else:
                dx = update.add_(dx)
        dx = _as(dy.dtype, dx)
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    if needs.w:
        dw = _as(dy.dtype, converted.T @ _as(large, rows))
    if needs.a:
        da = _as(a.dtype, da)
    if needs.b:
        db = _join(
            [
                (part(h, 1, ranks).T @ _as(acc, part(wide_dy, 1, columns))).T * scaling
                for columns, _, ranks in enabled
            ],
            dim=0,
        )
        db = _as(b.dtype, db).contiguous()
    if needs.bias:
        dbias = dy_rows.sum(0)
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [M, N] as [..., N], with the leading dimensions of x [..., K]; not a view.

    Autograd forbids in-place changes, such as nn.ReLU(inplace=True), of a view that a Function
    returns.
    """
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale·left·right in place; out's dtype may have fewer bits than the product's."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:  # a mixed sum in place takes a CPU several times as long as two conversions
        out.copy_(out.to(left.dtype).addmm_(left, right, alpha=scale))


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """tensor.to(dtype), without a call if there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def part(tensor: Tensor, dim: int, some: slice) -> Tensor:
    """tensor's slice some along dim, without a call if that is all of it."""
    size = some.stop - some.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, some.start, size)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
