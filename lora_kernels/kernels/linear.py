"""The two ops of reference.py, made of kernels by plan.

============  ==========================================  ===============================
plan          forward                                     backward
============  ==========================================  ===============================
``fused``     down, forward; for a few rows few_rows      dy_pass, dx, da
``sandwich``  down, fill_y, then cuBLAS adds x·wᵀ to it   dy_pass, fill_dx, cuBLAS, da
============  ==========================================  ===============================

Gradients of weight and bias, which LoRA leaves frozen, are PyTorch's own products.
"""

from collections.abc import Sequence

from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.da import da
from lora_kernels.kernels.down import down
from lora_kernels.kernels.dx import dx
from lora_kernels.kernels.dy_pass import dy_pass
from lora_kernels.kernels.few_rows import few_rows, takes
from lora_kernels.kernels.fill import fill_dx, fill_y
from lora_kernels.kernels.forward import forward
from lora_kernels.kernels.launch import Numerics, current, numerics_of
from lora_kernels.kernels.layout import either_way, rows
from lora_kernels.reference import shaped_like

__all__ = ["lora_linear_backward", "lora_linear_forward", "output"]


def lora_linear_forward(
    plan: str,
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
    """reference.lora_linear_forward by plan "fused" or "sandwich"."""
    x_rows, a = rows(x), rows(a)
    numerics = numerics_of(x, a, b)
    groups = tuple(out_splits), tuple(enable_lora)
    with current(x):
        if plan == "fused" and takes(x_rows.shape[0], b.shape[1], dropout_p, numerics):
            y, h = few_rows(
                x_rows, either_way(w), a, rows(b), None if bias is None else bias.contiguous(),
                seed, scaling, dropout_p, *groups, numerics,
            )  # fmt: skip
        else:
            h = down(x_rows, a, seed, dropout_p, numerics)
            y = output(plan, x_rows, w, h, b, bias, scaling, *groups, numerics)
    return shaped_like(x, y), h


def output(
    plan: str,
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    numerics: Numerics,
) -> Tensor:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ by plan, of operands that lie in any way but x and h.

    Shapes: as in forward.
    """
    w, b = either_way(w), rows(b)
    bias = None if bias is None else bias.contiguous()
    if plan == "fused":
        return forward(x, w, h, b, bias, scaling, out_splits, enable_lora, numerics)
    y = fill_y(h, b, bias, scaling, out_splits, enable_lora, x.dtype, numerics)
    return y.addmm_(x, w.T)


def lora_linear_backward(
    plan: str,
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
    """reference.lora_linear_backward by plan "fused" or "sandwich"."""
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    dy_rows = rows(dy)
    x_rows = None if x is None else rows(x)
    h = None if h is None else h.contiguous()
    a = None if a is None else rows(a)
    numerics = numerics_of(dy, a, b)
    grad_x = grad_w = grad_a = grad_b = grad_bias = None
    with current(dy):
        if needs_x or needs_a or needs_b:
            keep_scale = dropout.keep_scale(dropout_p)
            dh, grad_b = dy_pass(
                dy_rows, rows(b), h, scaling * keep_scale, scaling,
                tuple(out_splits), tuple(enable_lora), needs_x or needs_a, needs_b, numerics,
            )  # fmt: skip
        if needs_x:
            w = either_way(w)
            if plan == "fused":
                grad_x = dx(dy_rows, w, dh, a, seed, dropout_p, numerics)
            else:
                grad_x = fill_dx(dh, a, seed, dropout_p, dy.dtype, numerics)
                grad_x.addmm_(dy_rows, w)
            grad_x = grad_x.view(*dy.shape[:-1], grad_x.shape[1])
        if needs_w:
            grad_w = dy_rows.T @ x_rows
        if needs_a:
            grad_a = da(dh, x_rows, seed, dropout_p, a.dtype, numerics)
        if needs_bias:
            grad_bias = dy_rows.sum(0)
    return [g for g in (grad_x, grad_w, grad_a, grad_b, grad_bias) if g is not None]
