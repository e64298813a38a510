"""Every op in plain PyTorch: the specification, the CPU path and the oracle of the tests.

Notation: x [M, K] input; w [N, K] base weight; a [E*r, K] and b [sum of enabled splits, r] LoRA
factors of E enabled groups of output columns (LoRALinear: one group, E = 1); x_hat = dropout(x);
h = x_hat·aᵀ [M, E*r]; dh = scaling·dy·b [M, E*r]. Low-rank products run in float32 at least,
whatever the dtypes of x, a and b.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import philox

__all__ = [
    "accumulate_dtype",
    "groups",
    "lora_linear_backward",
    "lora_linear_forward",
    "lora_shared_linear_backward",
    "lora_shared_linear_forward",
    "low_rank_input",
    "shaped_like",
]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of h and dh: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def groups(
    out_splits: Sequence[int], enable_lora: Sequence[bool], r: int
) -> Iterator[tuple[slice, slice, slice]]:
    """For each enabled group: its columns of y, its rows of b, its rows of a (columns of h)."""
    column = row = rank = 0
    for size, enabled in zip(out_splits, enable_lora, strict=True):
        if enabled:
            yield (
                slice(column, column + size),
                slice(row, row + size),
                slice(rank, rank + r),
            )
            row += size
            rank += r
        column += size


def low_rank_input(x: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """h = x_hat·aᵀ. Shapes: x [..., K], a [R, K] -> h [M, R] in accumulate_dtype."""
    rows = x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(x.dtype)
    if dropout_p == 0:
        return _as(acc, rows) @ _as(acc, a).T
    factor = _as(acc, a).T
    parts = [
        _dropped(rows[some], mask) @ factor
        for some, mask in philox.masks(seed, *rows.shape, dropout_p, acc)
    ]
    return _join(parts, dim=0) * philox.keep_scale(dropout_p)


def lora_linear_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    out_splits: Sequence[int],
    enable_lora: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias, plus scaling·h·bᵀ in the columns of each enabled group; h = x_hat·aᵀ.

    Shapes: x [..., K], w [N, K], a [E*r, K], b [sum of enabled splits, r], bias [N], seed [1]
    -> y [..., N], h [M, E*r] in accumulate_dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(x.dtype)
    y = F.linear(rows, w, bias)
    h = low_rank_input(rows, a, seed, dropout_p)
    for columns, b_rows, ranks in groups(out_splits, enable_lora, b.shape[1]):
        factor = _as(acc, _part(b, 0, b_rows)).T
        add_product_(_part(y, 1, columns), _part(h, 1, ranks), factor, scaling)
    return shaped_like(x, y), h


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    w: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    out_splits: Sequence[int],
    enable_lora: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of lora_linear_forward that needs = (x, w, a, b, bias) asks for, in that order.

    dx = dy·w + mask∘(dh·a); dw = dyᵀ·x; da = dhᵀ·x_hat; db = scaling·dyᵀ·h;
    dbias = column sums of dy. An operand may be None where no gradient asked for depends on it: x
    but for dw and da, h but for db, w but for dx, a but for dx and da, b but for dx, da and db.
    """
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    dy_rows = dy.reshape(-1, dy.shape[-1])
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(dy.dtype)
    dx = dw = da = db = dbias = None

    enabled = list(groups(out_splits, enable_lora, b.shape[1])) if b is not None else []

    if needs_x or needs_a:
        # b is copied column by column: BLAS is twice as fast on a skinny factor that way.
        dh = _join(
            [
                F.linear(
                    _as(acc, _part(dy_rows, 1, columns)),
                    _as(acc, _part(b, 0, b_rows)).T.contiguous(),
                )
                for columns, b_rows, _ in enabled
            ],
            dim=1,
        )
        dh = dh * (scaling * philox.keep_scale(dropout_p))
    update = None
    if dropout_p > 0 and (needs_x or needs_a):
        update = dh @ _as(acc, a) if needs_x else None
        for some, mask in philox.masks(seed, dy_rows.shape[0], a.shape[1], dropout_p, acc):
            if needs_x:
                update[some].mul_(mask)
            if needs_a:
                part = dh[some].T @ _dropped(rows[some], mask)
                da = part if da is None else da.add_(part)
    elif needs_a:
        da = dh.T @ _as(acc, rows)
    if needs_x:
        if update is None:
            dx = dy_rows @ w
            add_product_(dx, dh, _as(acc, a), 1.0)
        elif dy.dtype == torch.float32:  # in the memory that update has
            dx = update.addmm_(dy_rows, w)
        else:
            dx = (dy_rows @ w).add_(update)
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    if needs_w:
        dw = dy_rows.T @ rows
    if needs_a:
        da = _as(a.dtype, da)
    if needs_b:
        db = _join(
            [
                (_part(h, 1, ranks).T @ _as(acc, _part(dy_rows, 1, columns))).T * scaling
                for columns, _, ranks in enabled
            ],
            dim=0,
        )
        db = _as(b.dtype, db).contiguous()
    if needs_bias:
        dbias = dy_rows.sum(0)
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]


def lora_shared_linear_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """lora_linear_forward of L layers that share x, each with a mask of its own; the y, then h.

    Shapes: x [..., K], ws L of [N_l, K], a [L, r, K], bs L of [N_l, r], seeds [L]
    -> L of y [..., N_l], and h [L, M, r].
    """
    results = [
        lora_linear_forward(
            x, w, a[i], b, bias, _seed(seeds, i), scalings[i], dropout_p, (w.shape[0],), (True,)
        )
        for i, (w, b, bias) in enumerate(zip(ws, bs, biases, strict=True))
    ]
    ys, hs = zip(*results, strict=True)
    return [*ys, torch.stack(hs)]


def lora_shared_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    seeds: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of lora_shared_linear_forward that needs = (x, ws, a, bs, biases) asks for.

    One dx, the sum over the layers; L of dw; da [L, r, K]; L of db; L of dbias; in that order.
    x may be None but for dw and da, h but for db.
    """
    grads: list[list[Tensor]] = []
    for i, (dy, w, b) in enumerate(zip(dys, ws, bs, strict=True)):
        grads.append(
            lora_linear_backward(
                dy, x, None if h is None else h[i], w, a[i], b, _seed(seeds, i), scalings[i],
                dropout_p, (w.shape[0],), (True,), needs,
            )
        )  # fmt: skip
    results: list[Tensor] = []
    for name, *of_layers in zip(_needed(needs), *grads, strict=True):
        if name == "x":
            dx = of_layers[0]
            for other in of_layers[1:]:
                dx.add_(other)
            results.append(dx)
        elif name == "a":
            results.append(torch.stack(of_layers))
        else:
            results += of_layers
    return results


def _seed(seeds: Tensor | None, layer: int) -> Tensor | None:
    return None if seeds is None else seeds[layer : layer + 1]


def _needed(needs: Sequence[bool]) -> list[str]:
    names = ("x", "w", "a", "b", "bias")
    return [name for name, needed in zip(names, needs, strict=True) if needed]


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y [M, N] as x [..., K] lies, and no view: autograd forbids to change a view that a Function
    returns, as nn.ReLU(inplace=True) would.
    """
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def add_product_(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale·left·right in place; out may have fewer bits than the product."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.add_((left @ right).mul_(scale))


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """tensor.to(dtype), without a call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _part(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """tensor's entries part of dim, without a call where these are all."""
    size = part.stop - part.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, part.start, size)


def _dropped(rows: Tensor, mask: Tensor) -> Tensor:
    """rows * mask, in mask's memory where torch.func does not forbid it."""
    if torch._C._are_functorch_transforms_active():
        return rows * mask
    return mask.mul_(rows)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
