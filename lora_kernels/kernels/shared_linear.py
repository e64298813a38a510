"""The two ops of reference.py for layers that share x, made of kernels.

x is read once for every h and once for every da, and dx is accumulated in place.

============  ===================================  ===============================================
plan          forward                              backward
============  ===================================  ===============================================
``fused``     down, a forward a layer              a dy_pass a layer, fill_dx, cuBLAS adds each
``sandwich``  down, a fill_y and cuBLAS a layer    dy·w to it, da
============  ===================================  ===============================================
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.da import da
from lora_kernels.kernels.down import down
from lora_kernels.kernels.dy_pass import dy_pass
from lora_kernels.kernels.fill import fill_dx
from lora_kernels.kernels.launch import current, numerics_of
from lora_kernels.kernels.layout import either_way, rows
from lora_kernels.kernels.linear import output
from lora_kernels.reference import shaped_like

__all__ = ["lora_shared_linear_backward", "lora_shared_linear_forward"]


def lora_shared_linear_forward(
    plan: str,
    x: Tensor,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """reference.lora_shared_linear_forward by plan "fused" or "sandwich"."""
    x_rows, a = rows(x), a.contiguous()
    numerics = numerics_of(x, a, *bs)
    ys = []
    with current(x):
        h = down(x_rows, a, seeds, dropout_p, numerics)
        for h_l, w, b, bias, scaling in zip(h, ws, bs, biases, scalings, strict=True):
            groups = (w.shape[0],), (True,)
            y = output(plan, x_rows, w, h_l, b, bias, scaling, *groups, numerics)
            ys.append(shaped_like(x, y))
    return [*ys, h]


def lora_shared_linear_backward(
    plan: str,
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
    """reference.lora_shared_linear_backward by plan "fused" or "sandwich", which are the same."""
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    dy_rows = [rows(dy) for dy in dys]
    x_rows = None if x is None else rows(x)
    a = a.contiguous()
    hs = [None] * len(dys) if h is None else h.contiguous()
    numerics = numerics_of(dys[0], a, *bs)
    grads: list[Tensor] = []
    with current(dys[0]):
        dhs, dbs = [], []
        if needs_x or needs_a or needs_b:
            keep_scale = dropout.keep_scale(dropout_p)
            for dy, h_l, b, scaling in zip(dy_rows, hs, bs, scalings, strict=True):
                dh, db = dy_pass(
                    dy, rows(b), h_l, scaling * keep_scale, scaling, (dy.shape[1],), (True,),
                    needs_x or needs_a, needs_b, numerics,
                )  # fmt: skip
                dhs.append(dh)
                dbs.append(db)
        if needs_x or needs_a:
            dh = torch.stack(dhs)  # [L, M, r]
        if needs_x:
            dx = fill_dx(dh, a, seeds, dropout_p, dys[0].dtype, numerics)
            for dy, w in zip(dy_rows, ws, strict=True):
                dx.addmm_(dy, either_way(w))
            grads.append(dx.view(*dys[0].shape[:-1], dx.shape[1]))
        if needs_w:
            grads += [dy.T @ x_rows for dy in dy_rows]
        if needs_a:
            grads.append(da(dh, x_rows, seeds, dropout_p, a.dtype, numerics))
        if needs_b:
            grads += dbs
        if needs_bias:
            grads += [dy.sum(0) for dy in dy_rows]
    return grads
