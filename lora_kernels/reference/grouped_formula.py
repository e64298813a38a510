"""The backward of lora_grouped_linear in PyTorch that can be differentiated and batched.

grouped_linear.py computes the same with less memory, but it writes in place. Notation: see there.
"""

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.reference.grouped_linear import Segment, segments
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import GroupedSpec, Needs

__all__ = ["lora_grouped_linear_backward"]


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
    """grouped_linear.lora_grouped_linear_backward, as a function of dy, x, w, a and b.

    If x is given, h is computed from it and a again. h is a constant if it is not.
    """
    acc, found, experts = accumulate_dtype(dy.dtype), segments(ends, groups, w), w.dim() == 3
    dxs, das, dbs = [], _Sums(a.mT.to(acc)), _Sums(b.mT.to(acc))
    dws, dbiases = (
        _Sums(w if experts else w[None]),
        _Sums(w[..., :1] if experts else w[None, :, :1]),
    )
    for segment in _with_tail(found, dy.shape[0]):
        rows, g, e = segment.rows, segment.group, segment.expert
        some, base = dy[rows], w[e] if experts else w
        alone = experts and e < 0  # behind the last segment
        if x is not None:
            x_rows = x[rows] if index is None else x.index_select(0, index[rows])
        dx = some.new_zeros((segment.stop - segment.start, w.shape[-1])) if alone else some @ base
        if g >= 0:
            p = spec.dropout_p(g)
            wide = some.to(acc)
            dh = (wide @ b[g].to(acc)) * spec.scaling(g)
            mask = _mask(segment, w.shape[-1], seeds, p, acc)
            dx = dx + ((dh @ a[g].to(acc)) * mask).to(dx.dtype)
            h_rows = h[rows] if h is not None else None
            if x is not None:
                x_hat = x_rows.to(acc) * mask
                h_rows = x_hat @ a[g].to(acc).T
                das.add(g, x_hat.T @ dh)
            if h_rows is not None:
                dbs.add(g, (h_rows.T @ wide) * spec.scaling(g))
        if not alone:
            dbiases.add(max(e, 0), some.sum(0)[:, None])
            if x is not None:
                dws.add(max(e, 0), some.T @ x_rows)
        dxs.append(dx)
    grads = []
    if needs.x:
        dx = torch.cat(dxs) if dxs else dy @ (w[0] if experts else w)
        if index is not None:
            dx = torch.zeros_like(dx[:1]).expand(sources, -1).index_add(0, index, dx)
        grads.append(dx)
    if needs.w:
        grads.append(dws.stack(dy.dtype) if experts else dws.stack(dy.dtype)[0])
    if needs.a:
        grads.append(das.stack(a.dtype).mT)
    if needs.b:
        grads.append(dbs.stack(b.dtype).mT)
    if needs.bias:
        dbias = dbiases.stack(dy.dtype).squeeze(-1)
        grads.append(dbias if experts else dbias[0])
    return grads


class _Sums:
    """A sum for each matrix of a stack; zero for those that nothing is added to."""

    def __init__(self, like: Tensor):
        self.like = like
        self.sums: dict[int, Tensor] = {}

    def add(self, place: int, term: Tensor) -> None:
        self.sums[place] = self.sums[place] + term if place in self.sums else term

    def stack(self, dtype: torch.dtype) -> Tensor:
        zero = torch.zeros_like(self.like[0])
        return torch.stack([self.sums.get(i, zero) for i in range(len(self.like))]).to(dtype)


def _with_tail(found: list[Segment], count: int) -> list[Segment]:
    """The segments, and the rows behind them as one without a group or an expert."""
    stop = found[-1].stop if found else 0
    return [*found, Segment(stop, count, -1, -1, 0)] if stop < count else found


def _mask(
    segment: Segment, cols: int, seeds: Tensor | None, p: float, acc: torch.dtype
) -> Tensor | float:
    """What dropout multiplies the segment's rows by."""
    if p == 0:
        return 1.0
    g, count = segment.group, segment.stop - segment.start
    kept = dropout.keep_mask(seeds[g : g + 1], count, cols, p, segment.first, acc)
    return kept * dropout.keep_scale(p)
