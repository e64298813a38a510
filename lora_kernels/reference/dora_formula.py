"""lora_linear with a magnitude and its backward in PyTorch that can be differentiated and recorded.

To dora.py what formula.py is to linear.py. The norms are those of a tensor of w's size here.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.checks import without_autocast
from lora_kernels.reference import formula
from lora_kernels.reference.dora import over_norm, scale_of
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import DoraNeeds, DoraSpec

__all__ = ["dora_backward", "dora_forward", "row_norms", "with_magnitude"]


def row_norms(w: Tensor, a: Tensor, b: Tensor, spec: DoraSpec, acc: torch.dtype) -> Tensor:
    """norm [N] in acc, without a gradient."""
    w, a, b = (tensor.detach().to(acc) for tensor in (w, a, b))
    return torch.linalg.vector_norm(w + b @ a * spec.scaling, dim=1)


def with_magnitude(
    x: Tensor,
    x_hat: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    m: Tensor,
    spec: DoraSpec,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., N]; h [..., R] and c [..., N] in acc, of which y is m∘c + bias unless x_hat is in c.

    Shapes: x and x_hat [..., K], m [N].
    """
    seen = x_hat.to(x.dtype) if spec.drops_product else x
    product = F.linear(seen, w)
    rest = F.linear(x - seen, w).to(acc) if spec.drops_product else 0
    with without_autocast(x.device) if isinstance(x, Tensor) else contextlib.nullcontext():
        c, h = formula.with_update(product.to(acc), x_hat, a, b, spec, acc)
        y = rest + m * c if bias is None else rest + m * c + bias.to(acc)
    return y.to(product.dtype), h, c


def dora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    seed: Tensor | None,
    spec: DoraSpec,
) -> list[Tensor]:
    """What dora.dora_forward specifies, for the same operands."""
    acc = accumulate_dtype(x.dtype)
    norm = row_norms(w, a, b, spec, acc)
    x_hat = formula.dropped(x, seed, spec.dropout_p, acc)
    m = scale_of(magnitude, norm)
    y, h, c = with_magnitude(x, x_hat, w, a, b, bias, m, spec, acc)
    kept = [c.reshape(-1, c.shape[-1]).to(x.dtype)] if spec.drops_product else []
    return [y, h.reshape(-1, h.shape[-1]), norm, *kept]


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
    """What dora.dora_backward specifies, for the same operands, without kept."""
    dy_rows = dy.reshape(-1, dy.shape[-1])
    acc, grads = accumulate_dtype(dy.dtype), []
    wide_dy, m = dy_rows.to(acc), scale_of(magnitude, norm)
    dz = wide_dy * m
    x_rows = x_hat = None
    if x is not None and (needs.w or needs.a or needs.magnitude):
        x_rows = x.reshape(-1, x.shape[-1])
        x_hat = formula.dropped(x_rows, seed, spec.dropout_p, acc)
    if needs.x or needs.a:
        dh = dz @ b.to(acc) * spec.scaling
    if needs.x:
        update, through = dh @ a.to(acc), dz
        if spec.drops_product:
            update, through = update + (dz - wide_dy) @ w.to(acc), wide_dy
        update = formula.dropped(update, seed, spec.dropout_p, acc)
        dx = (through @ w.to(acc) + update).to(dy.dtype)
        grads.append(dx.reshape(*dy.shape[:-1], dx.shape[1]))
    if needs.w:
        wide_x = x_rows.to(acc)
        dw = dz.T @ wide_x
        if spec.drops_product:
            dw = wide_dy.T @ wide_x + (dz - wide_dy).T @ x_hat
        grads.append(dw.to(dy.dtype))
    if needs.a:
        grads.append((dh.T @ x_hat).to(a.dtype))
    if needs.b:
        grads.append((dz.T @ h * spec.scaling).to(b.dtype))
    if needs.bias:
        grads.append(dy_rows.sum(0))
    if needs.magnitude:
        seen = x_hat if spec.drops_product else x_rows.to(acc)
        z = F.linear(seen, w.to(acc)) + F.linear(h, b.to(acc)) * spec.scaling
        grads.append(over_norm((wide_dy * z).sum(0), norm).to(magnitude.dtype))
    return grads
