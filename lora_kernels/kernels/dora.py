"""lora_linear with a magnitude and its backward, made of kernels.

The forward is lora_linear's, by either algorithm, with m as the scale of y's columns. If
spec.drops_product, y = x·wᵀ + (m∘c - x_hat·wᵀ) + bias: apply_dropout makes x_hat, cuBLAS both large
products, and expand_split_y, out of the first one, c and what the second is added to.

The backward has m in grad_b. For dx it is folded into w or into dy, whichever is smaller. If
spec.drops_product, dx = mask∘(dz·w + dh·a) + dy·w with dz = (m - 1)/(1 - p)∘dy: cuBLAS makes both
large products, and expand_mask_dx what is between them.
"""

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.apply_dropout import apply_dropout
from lora_kernels.kernels.column_sums import column_sums
from lora_kernels.kernels.expand import expand_mask_dx, expand_split_y
from lora_kernels.kernels.grad_a import grad_a
from lora_kernels.kernels.grad_b import grad_b
from lora_kernels.kernels.launch import as_rows, on_device_of, with_unit_stride
from lora_kernels.kernels.linear import add_product_, lora_linear_forward, of_x_and_a
from lora_kernels.kernels.numerics import Numerics, numerics_of
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.weight_norm import weight_norm
from lora_kernels.reference.dora import of_column_sums, scale_of
from lora_kernels.reference.linear import shaped_like
from lora_kernels.spec import DoraNeeds, DoraSpec

__all__ = ["dora_backward", "dora_forward"]


def dora_forward(
    algorithm: str,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    seed: Tensor | None,
    spec: DoraSpec,
) -> list[Tensor]:
    """reference.dora.dora_forward by algorithm "fused" or "addmm"."""
    with on_device_of(x):
        w, numerics = with_unit_stride(w), numerics_of(w, a, b, narrow=spec.narrow)
        norm = weight_norm(w, as_rows(a), as_rows(b), spec.scaling, numerics)
        m = scale_of(magnitude, norm)
        if not spec.drops_product:
            y, h = lora_linear_forward(algorithm, x, w, a, b, bias, seed, spec, m)
            return [y, h, norm]
        rows, a, b = as_rows(x), as_rows(a), as_rows(b)
        numerics = numerics_of(x, a, b, narrow=spec.narrow)
        bias = None if bias is None else bias.contiguous()
        h = shrink(rows, a, seed, spec.dropout_p, numerics)
        product = apply_dropout(rows, seed, spec.dropout_p) @ w.T
        c, y = expand_split_y(product, h, b, bias, m, spec, numerics)
        return [shaped_like(x, y.addmm_(rows, w.T)), h, norm, c]


def dora_backward(
    algorithm: str,
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
    """reference.dora.dora_backward by algorithm "fused" or "addmm"."""
    dy_rows, rows, a = as_rows(dy), as_rows(x), as_rows(a)
    numerics, m = numerics_of(dy, a, b, narrow=spec.narrow), scale_of(magnitude, norm)
    dx = dw = da = db = dbias = dmagnitude = None
    with on_device_of(dy):
        needs_dh = needs.x or needs.a
        if needs_dh or needs.b:
            of_b = h.contiguous() if needs.b else None
            dh, db = grad_b(dy_rows, as_rows(b), of_b, spec, needs_dh, numerics, col_scale=m)
        if needs_dh and spec.drops_product:
            dx, da = _through_both_products(
                dy_rows, rows, w, dh, a, seed, m, spec.dropout_p, numerics, needs
            )
        elif needs_dh:
            folded = dy_rows, w
            if needs.x and _folds_weight(dy_rows, w):
                folded = dy_rows, _scaled(w, m[:, None])
            elif needs.x:
                folded = _scaled(dy_rows, m), w
            left, right = folded
            dx, da = of_x_and_a(
                algorithm, left, rows, right, dh, a, seed, spec.dropout_p, numerics, needs
            )
        if needs.w and spec.drops_product:
            x_hat = apply_dropout(rows, seed, spec.dropout_p)
            dw = _scaled(dy_rows.T @ x_hat, (m - 1)[:, None]).addmm_(dy_rows.T, rows)
        elif needs.w:
            dw = _scaled(dy_rows.T @ rows, m[:, None])
        if needs.bias:
            dbias = dy_rows.sum(0)
        if needs.magnitude:
            of_y = None if bias is None or spec.drops_product else bias.contiguous()
            sums = column_sums(dy_rows, as_rows(kept), of_y)
            dmagnitude = of_column_sums(sums, dy_rows, rows, h, w, b, bias, m, norm, spec)
            dmagnitude = dmagnitude.to(magnitude.dtype)
    if dx is not None:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return [grad for grad in (dx, dw, da, db, dbias, dmagnitude) if grad is not None]


def _through_both_products(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    dh: Tensor,
    a: Tensor,
    seed: Tensor,
    m: Tensor,
    dropout_p: float,
    numerics: Numerics,
    needs: DoraNeeds,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and da if dropout acts on the product with w, too, and they are needed."""
    dx = da = None
    if needs.x:
        dz = _scaled(dy, (m - 1) * dropout.keep_scale(dropout_p))
        dx = (dz.to(w.dtype) @ with_unit_stride(w)).to(dy.dtype)
        add_product_(expand_mask_dx(dx, dh, a, seed, dropout_p, numerics), dy, w)
    if needs.a:
        da = grad_a(dh, x, seed, dropout_p, a.dtype, numerics)
    return dx, da


def _folds_weight(dy: Tensor, w: Tensor) -> bool:
    """Whether w is smaller than dy. Shapes: [M, N], [N, K]."""
    return len(dy) > w.shape[1]


def _scaled(matrix: Tensor, scale: Tensor) -> Tensor:
    """matrix·scale, rounded once to matrix's dtype. scale: a row or a column, in float32."""
    return torch.mul(matrix, scale, out=torch.empty_like(matrix))
