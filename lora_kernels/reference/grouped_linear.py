"""lora_grouped_linear and its backward in plain PyTorch: low-rank products by segments of rows.

Notation: x [S, K] holds Q segments of rows, one after another; segment q ends before row ends[q].
With index [S], row i is x[index[i]] of an x [T, K], which is never gathered as a whole.
a [G, R, K] and b [G, N, R] are the factors of G groups. Segment q takes those of group groups[q],
the q-th if groups is None, and none if it is -1. w is one weight [N, K] for all rows, or a stack
[E, N, K] of experts. Then each expert has Q/E segments, expert after expert. A group's dropout mask
counts its own rows: it does not depend on which others are in the batch.

h [S, R] and dh [S, R] are as in linear.py, by segment. Rows behind the last end have no update, and
with experts no product: their y and dx are zero. Low-rank products run in float32 at least.

The update comes first, and the large product is added to it: matrix products add in float32 even
if they store 16 bits. The other way round, an update below half a bit of y would be rounded off.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.reference.products import product_dtype
from lora_kernels.spec import GroupedSpec, Needs

__all__ = ["Segment", "lora_grouped_linear_backward", "lora_grouped_linear_forward", "segments"]


class Segment(NamedTuple):
    """Rows [start, stop) of the batch, with the group that updates them and their expert.

    group: -1 for none. expert: 0 if one weight serves all. first: how many rows of the group lie
    before this segment.
    """

    start: int
    stop: int
    group: int
    expert: int
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def segments(ends: Tensor, groups: Tensor | None, w: Tensor) -> list[Segment]:
    """The segments that have rows, in order."""
    stops = ends.tolist()
    of_segment = range(len(stops)) if groups is None else groups.tolist()
    per_expert = 1 if w.dim() == 2 else max(1, len(stops) // w.shape[0])
    found: list[Segment] = []
    seen: dict[int, int] = {}
    start = 0
    for q, (stop, group) in enumerate(zip(stops, of_segment, strict=True)):
        if stop > start:
            expert = q // per_expert if w.dim() == 3 else 0
            first = seen.get(group, 0)
            found.append(Segment(start, stop, group, expert, first))
            seen[group] = first + stop - start
            start = stop
    return found


def lora_grouped_linear_forward(
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
    """y = x·wᵀ + bias + s_g·h·b_gᵀ for the rows of each segment; h = x_hat·a_gᵀ.

    Shapes: x [S, K], or [T, K] with index [S]; w [N, K] or [E, N, K]; a [G, R, K]; b [G, N, R];
    bias [N], or [E, N] with experts; ends, groups [Q]; seeds [G] -> y [S, N], h [S, R] in
    accumulate_dtype, zero where a segment has no group.
    """
    acc = accumulate_dtype(x.dtype)
    count = x.shape[0] if index is None else index.shape[0]
    found, experts = segments(ends, groups, w), w.dim() == 3
    # Float32 and float64 lose nothing either way: rows without a group are those of F.linear.
    wide = x.dtype == acc and not experts
    if wide:
        y = F.linear(_rows(x, index, slice(0, count)), w, bias)
    else:
        y = x.new_zeros((count, w.shape[-2]))
    h = x.new_empty((count, a.shape[1]), dtype=acc)
    h[found[-1].stop if found else 0 :] = 0
    a_t, b_t = a.to(acc).mT.unbind(), b.to(acc).mT.unbind()
    for segment in found:
        rows, y_rows, g = _rows(x, index, segment.rows), y[segment.rows], segment.group
        h_rows = h[segment.rows]
        if g < 0:
            h_rows.zero_()
        else:
            for some, x_hat in _x_hat(rows, segment, seeds, spec, acc):
                torch.mm(x_hat, a_t[g], out=h_rows[some])
            if spec.dropout_p(g):
                h_rows *= dropout.keep_scale(spec.dropout_p(g))
            _product_(y_rows, h_rows, b_t[g], spec.scaling(g), add=wide)
        if experts:
            _add_large_(y_rows, rows, w[segment.expert].T)
            if bias is not None:
                y_rows += bias[segment.expert]
    if not experts and not wide:
        _add_large_(y, _rows(x, index, slice(0, count)), w.T)
        if bias is not None:
            y += bias
    return y, h


def lora_grouped_linear_backward(
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
    """The gradients of lora_grouped_linear_forward that needs asks for, in its order.

    By segment: dx = dy·w + mask∘(dh·a_g), dw = dyᵀ·x, da_g = dhᵀ·x_hat, db_g = s_g·dyᵀ·h,
    dbias = column sums of dy; summed over the segments of a group or an expert, in order. With
    index, dx [T, K] sums the rows that x gave. sources: T, the rows of x. x may be None if neither
    dw nor da is needed, h if db is not.
    """
    acc, count = accumulate_dtype(dy.dtype), dy.shape[0]
    found, experts = segments(ends, groups, w), w.dim() == 3
    dx_rows = dw = da = db = dbias = dx = None
    wide = dy.dtype == acc and not experts  # as in the forward
    if needs.x:
        dx_rows = dy @ w if wide else dy.new_zeros((count, w.shape[-1]))
    if needs.w:
        dw = dy.new_zeros(w.shape) if experts else dy.T @ _rows(x, index, slice(0, count))
    if needs.bias:
        dbias = dy.new_zeros(w.shape[:-1]) if experts else dy.sum(0)
    if needs.a:
        da = torch.empty(a.shape, dtype=acc, device=dy.device)
    if needs.b:
        db = torch.empty(b.shape, dtype=acc, device=dy.device)
    for g in set(range(a.shape[0])).difference(segment.group for segment in found):
        for grad in (da, db):
            if grad is not None:
                grad[g].zero_()
    a_of, b_of = a.to(acc).unbind(), b.to(acc).unbind()
    da_of = da.unbind() if needs.a else ()
    db_of = db.unbind() if needs.b else ()

    for segment in found:
        some, g, e = segment.rows, segment.group, segment.expert
        dy_rows = dy[some]
        rows = _rows(x, index, some) if needs.w or needs.a else None
        if g >= 0:
            p, scaling, dy_acc = spec.dropout_p(g), spec.scaling(g), dy_rows.to(acc)
            if needs.x or needs.a:
                dh = (dy_acc @ b_of[g]).mul_(scaling * dropout.keep_scale(p))
            if needs.a:
                for part, x_hat in _x_hat(rows, segment, seeds, spec, acc):
                    begins = segment.first == part.start == 0  # what was there is not read
                    da_of[g].addmm_(dh[part].T, x_hat, beta=0 if begins else 1)
            if needs.x:
                _update_dx_(dx_rows[some], dh, a_of[g], segment, seeds, p, add=wide)
            if needs.b:
                db_of[g].addmm_(dy_acc.T, h[some], beta=segment.first != 0, alpha=scaling)
        if experts:
            if needs.x:
                _add_large_(dx_rows[some], dy_rows, w[e], backward=True)
            if needs.w:
                dw[e].addmm_(dy_rows.T, rows)
            if needs.bias:
                dbias[e] += dy_rows.sum(0)
    if needs.x:
        if not experts and not wide:
            _add_large_(dx_rows, dy, w, backward=True)
        dx = dx_rows
        if index is not None:
            dx = dy.new_zeros((sources, w.shape[-1])).index_add_(0, index, dx_rows)
    da = None if da is None else da.to(a.dtype)
    db = None if db is None else db.to(b.dtype)
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]


def _rows(x: Tensor, index: Tensor | None, some: slice) -> Tensor:
    """Rows of the batch: a view of x, or rows that index gathers."""
    return x[some] if index is None else x.index_select(0, index[some])


def _x_hat(
    rows: Tensor, segment: Segment, seeds: Tensor | None, spec: GroupedSpec, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """x_hat·(1 - p) of a segment, a slice of its rows at a time."""
    p = spec.dropout_p(segment.group)
    if p == 0:
        yield slice(0, rows.shape[0]), rows.to(acc)
        return
    for some, mask in _masks(segment, rows.shape[1], seeds, p, acc):
        yield some, mask.mul_(rows[some])


def _update_dx_(
    dx: Tensor,
    dh: Tensor,
    a: Tensor,
    segment: Segment,
    seeds: Tensor | None,
    p: float,
    add: bool,
) -> None:
    """dx = mask∘(dh·a) in place, plus what was there if add is set."""
    if p == 0:
        _product_(dx, dh, a, 1.0, add)
        return
    for some, mask in _masks(segment, a.shape[1], seeds, p, dh.dtype):
        update = mask.mul_(dh[some] @ a)
        if add:
            dx[some].add_(update)
        else:
            dx[some] = update


def _masks(
    segment: Segment, cols: int, seeds: Tensor, p: float, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    count, g = segment.stop - segment.start, segment.group
    return dropout.masks(seeds[g : g + 1], count, cols, p, acc, segment.first)


def _add_large_(out: Tensor, left: Tensor, right: Tensor, backward: bool = False) -> None:
    """out += left·right in place, in the dtype that products.py names."""
    dtype = product_dtype(out.dtype, out.device, len(left), backward)
    if dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.copy_(out.to(dtype).addmm_(left.to(dtype), right.to(dtype)))


def _product_(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool = False) -> None:
    """out = scale·left·right in place, plus what was there if add is set.

    out's dtype may have fewer bits than the product's, unless add is set.
    """
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=int(add), alpha=scale, out=out)
    else:
        out.copy_((left @ right).mul_(scale))
