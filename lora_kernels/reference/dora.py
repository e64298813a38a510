"""lora_linear with a magnitude (DoRA) and its backward in plain PyTorch.

The notation of linear.py, for one group of output columns, and magnitude [N]; norm [N] = the norms
of the rows of w + scaling·b·a, a constant for every gradient; m [N] = magnitude / norm:

    y = m∘(x·wᵀ + scaling·h·bᵀ) + bias.

Dropout acts in one of two ways. In PEFT's, the part that the magnitude adds to the frozen layer
sees the dropped-out x too: y = x·wᵀ + bias + (m - 1)∘(x_hat·wᵀ) + scaling·m∘(h·bᵀ), which is
(x - x_hat)·wᵀ + m∘c + bias with c = x_hat·wᵀ + scaling·h·bᵀ. It takes a second large product. With
spec.low_rank_only the formula above holds, with h = x_hat·aᵀ.

A row of zeros of w + scaling·b·a has no direction: its m is 1. So its lora_B has LoRA's gradient,
which can lead it away from zero, and its magnitude has none.

The backward needs z = (y - bias) / m for the gradient of magnitude, and takes it out of y, which
its caller keeps anyway. In columns with a small m, or none, or a large bias, y has lost z: they are
computed again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.reference.linear import accumulate_dtype, low_rank_input, shaped_like
from lora_kernels.reference.products import matmul, product_dtype
from lora_kernels.spec import DoraNeeds, DoraSpec

__all__ = [
    "dora_backward", "dora_forward", "magnitude_gradient", "of_column_sums", "over_norm",
    "row_norms", "scale_of",
]  # fmt: skip

_ZERO = torch.finfo(torch.float32).tiny  # below it, a norm is that of a row of zeros
_SMALL = 1 / 16  # of an m: below it, y is not worth z
_CANCELLED = 1e-2  # of the squares' sum: below it, a norm out of three terms loses digits
_AT_ONCE = 1 << 20  # elements of w that are in work at once: a few MB


# ---- the norms ----


def row_norms(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norms of the rows of w + scaling·b·a, without a tensor of w's size.

    Shapes: w [N, K], a [R, K], b [N, R] -> [N] in accumulate_dtype of w. On a CPU
    norm² = ‖w‖² + Σ b∘(2·scaling·w·aᵀ + scaling²·b·(a·aᵀ)); rows in which these terms nearly cancel
    are computed directly.
    """
    acc = accumulate_dtype(w.dtype)
    w, a, b = w.detach(), a.detach().to(acc), b.detach().to(acc) * scaling
    if not w.is_cpu:
        return torch.cat([_direct_norms(w[some].to(acc), a, b[some]) for some in _slices(w)])
    gram, norms = a @ a.T, w.new_empty(w.shape[0], dtype=acc)
    for some in _slices(w):
        rows, factor = w[some].to(acc), b[some]
        own = torch.linalg.vector_norm(rows, dim=1).square_()
        update = factor @ gram
        update_size = (update * factor).sum(1)
        crossed = update.add_(rows @ a.T, alpha=2).mul_(factor).sum(1)
        squares = torch.add(own, crossed, out=norms[some])
        cancelled = squares < _CANCELLED * (own + update_size)
        squares.sqrt_()
        if cancelled.any():
            norms[some][cancelled] = _direct_norms(rows[cancelled], a, factor[cancelled])
    return norms


def _slices(w: Tensor) -> Iterator[slice]:
    step = max(1, (_AT_ONCE if w.is_cpu else 16 * _AT_ONCE) // max(1, w.shape[1]))
    for start in range(0, max(1, w.shape[0]), step):
        yield slice(start, start + step)


def _direct_norms(rows: Tensor, a: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.addmm(rows, factor, a), dim=1)


def scale_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m = magnitude / norm; 1 for a row of zeros."""
    return _divided(magnitude.to(norm.dtype), norm, 1)


def over_norm(values: Tensor, norm: Tensor) -> Tensor:
    """values / norm; 0 for a row of zeros."""
    return _divided(values, norm, 0)


def _divided(values: Tensor, norm: Tensor, of_zero: int) -> Tensor:
    zero = norm < _ZERO
    return (values / norm.masked_fill(zero, 1)).masked_fill(zero, of_zero)


# ---- forward and backward ----


def dora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    seed: Tensor | None,
    spec: DoraSpec,
    norm: Tensor | None = None,
) -> list[Tensor]:
    """y, h and norm, and c if spec.drops_product. norm: if it is known.

    Shapes: x [..., K], w [N, K], a [R, K], b [N, R], bias [N], magnitude [N], seed [1] ->
    y [..., N], h [M, R] and norm [N] in accumulate_dtype, c [M, N].
    """
    rows = x.reshape(-1, x.shape[-1])
    w = w.to(product_dtype(w.dtype, w.device, len(rows)))  # once, for the norms and all products
    rows = rows.to(torch.promote_types(rows.dtype, w.dtype))
    norm = row_norms(w, a, b, spec.scaling) if norm is None else norm
    m = scale_of(magnitude, norm)
    if not spec.drops_product:
        h = low_rank_input(rows, a, seed, spec.dropout_p)
        z = _product(rows, w, h, b, spec.scaling)
        y = z.mul_(m) if bias is None else z.mul_(m).add_(bias)
        return [shaped_like(x, y.to(x.dtype)), h, norm]
    x_hat, h = _dropped(rows, a, seed, spec.dropout_p)
    c = _product(x_hat, w, h, b, spec.scaling)
    rest = torch.sub(rows, x_hat, out=x_hat)  # fresh memory costs more than the difference
    y = matmul(rest, w.T).to(c.dtype).addcmul_(c, m)
    y = y if bias is None else y.add_(bias)
    return [shaped_like(x, y.to(x.dtype)), h, norm, c.to(x.dtype)]


def dora_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    magnitude: Tensor,
    seed: Tensor | None,
    norm: Tensor,
    kept: Tensor | None,
    spec: DoraSpec,
    needs: DoraNeeds,
) -> list[Tensor]:
    """The gradients of dora_forward that needs asks for, in its order.

    With dz = m∘dy and dh = scaling·dz·b: dx = dz·w + mask∘(dh·a); dw = dzᵀ·x; da = dhᵀ·x_hat;
    db = scaling·dzᵀ·h; dbias = column sums of dy; dmagnitude = column sums of dy∘z, over norm. If
    spec.drops_product: dx = dy·w + mask∘((dz - dy)·w + dh·a), dw = dyᵀ·x + (dz - dy)ᵀ·x_hat, and
    c is z.
    kept: y, or c if spec.drops_product. An operand may be None if no gradient asked for depends on
    it; dmagnitude depends on all but a and seed.
    """
    dy_rows = dy.reshape(-1, dy.shape[-1])
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(dy.dtype)
    m = scale_of(magnitude, norm)
    dx = dw = da = db = dbias = dmagnitude = None

    wide_dy = dy_rows.to(acc)
    dz = torch.empty_like(wide_dy) if needs.magnitude or needs.x else None
    if needs.magnitude:  # in dz's memory, before dz is in it
        dmagnitude = magnitude_gradient(wide_dy, rows, h, w, b, bias, m, norm, kept, spec, dz)
        dmagnitude = dmagnitude.to(magnitude.dtype)
    if needs.b:
        db = ((h.T @ wide_dy).T * (m * spec.scaling)[:, None]).to(b.dtype).contiguous()
    if needs.x:
        w = w.to(product_dtype(w.dtype, w.device, len(dy_rows), backward=True))
        torch.mul(wide_dy, m - 1 if spec.drops_product else m, out=dz)
    if needs.x or needs.a:
        scale = spec.scaling * dropout.keep_scale(spec.dropout_p)
        dh = wide_dy @ (b.to(acc) * (m * scale)[:, None])
        update = dh @ a.to(acc) if needs.x else None
        if needs.x and spec.drops_product:
            update = _plus_product_(update, dz, w, dropout.keep_scale(spec.dropout_p))
        da = _through_dropout(update, dh, rows if needs.a else None, seed, spec.dropout_p)
    if needs.x:
        whole = wide_dy if w.dtype == acc else dy_rows
        dx = _plus_product_(update, whole if spec.drops_product else dz, w).to(dy.dtype)
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    if needs.w and spec.drops_product:
        x_hat, _ = _dropped(rows, None, seed, spec.dropout_p)
        dw = (dy_rows.T @ rows).addcmul_(dy_rows.T @ x_hat, (m - 1)[:, None])
    elif needs.w:
        dw = (dy_rows.T @ rows).mul_(m[:, None])
    if needs.a:
        da = da.to(a.dtype)
    if needs.bias:
        dbias = dy_rows.sum(0)
    return [grad for grad in (dx, dw, da, db, dbias, dmagnitude) if grad is not None]


def magnitude_gradient(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor,
    bias: Tensor | None,
    m: Tensor,
    norm: Tensor,
    kept: Tensor,
    spec: DoraSpec,
    memory: Tensor | None = None,
) -> Tensor:
    """dmagnitude, as dora_backward has it, in accumulate_dtype.

    memory: like dy, to be written to. Shapes: dy [M, N] in accumulate_dtype, x [M, K], m [N].
    """
    sums = torch.mul(dy, kept.reshape(dy.shape), out=memory).sum(0)
    if bias is not None and not spec.drops_product:
        sums -= bias.to(dy.dtype) * dy.sum(0)
    return of_column_sums(sums, dy, x, h, w, b, bias, m, norm, spec)


def of_column_sums(
    sums: Tensor,
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor,
    bias: Tensor | None,
    m: Tensor,
    norm: Tensor,
    spec: DoraSpec,
) -> Tensor:
    """dmagnitude out of the column sums [N] of dy∘(y - bias), or of dy∘c if spec.drops_product.

    sums is written to. Shapes: as in magnitude_gradient; dy in any dtype.
    """
    if spec.drops_product:
        return over_norm(sums, norm)
    sums /= m
    some = _columns_without_z(m, norm, x, bias)
    if isinstance(some, slice) or len(some):
        z = _product(x, w[some], h, b[some], spec.scaling)
        sums[some] = z.mul_(dy[:, some]).sum(0)
    return over_norm(sums, norm)


def _columns_without_z(m: Tensor, norm: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | slice:
    """Those with a small m, or a bias larger than y - bias for an x of no particular direction:
    m·norm times the root mean square of x.
    """
    if m.is_cuda and torch.cuda.is_current_stream_capturing():
        return slice(None)  # all: the host cannot ask which
    lost = m.abs() < _SMALL
    if bias is not None:
        size = torch.linalg.vector_norm(x, dtype=m.dtype) / x.numel() ** 0.5
        lost |= bias.abs() > (m * norm).abs() * size
    return lost.nonzero().flatten()


# ---- products ----


def _product(rows: Tensor, w: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    """rows·wᵀ + scaling·h·bᵀ in accumulate_dtype. Shapes: [M, K], [N, K], [M, R], [N, R]."""
    return matmul(rows, w.T).to(h.dtype).addmm_(h, b.to(h.dtype).T, alpha=scaling)


def _plus_product_(update: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """update + scale·left·right in place, in accumulate_dtype."""
    if update.dtype == left.dtype == right.dtype:
        return update.addmm_(left, right, alpha=scale)
    return update.add_(matmul(left, right, backward=True), alpha=scale)


def _dropped(
    rows: Tensor, a: Tensor | None, seed: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor | None]:
    """x_hat [M, K] in rows' dtype and h = x_hat·aᵀ [M, R], which is not made of a rounded x_hat."""
    acc = accumulate_dtype(rows.dtype)
    x_hat, parts = torch.empty_like(rows), []
    m, k = rows.shape
    factor = None if a is None else a.to(acc).T
    for some, mask in dropout.masks(seed, m, k, dropout_p, acc):
        mask.mul_(rows[some]).mul_(dropout.keep_scale(dropout_p))
        if a is not None:
            parts.append(mask @ factor)
        x_hat[some] = mask
    return x_hat, torch.cat(parts) if parts else None


def _through_dropout(
    update: Tensor | None, dh: Tensor, rows: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor | None:
    """Masks update [M, K] in place; da = dhᵀ·(mask∘rows), None without rows."""
    if dropout_p == 0:
        return None if rows is None else dh.T @ rows.to(dh.dtype)
    da, (m, k) = None, (update if rows is None else rows).shape
    for some, mask in dropout.masks(seed, m, k, dropout_p, dh.dtype):
        if update is not None:
            update[some].mul_(mask)
        if rows is not None:
            of_slice = dh[some].T @ mask.mul_(rows[some])
            da = of_slice if da is None else da.add_(of_slice)
    return da
