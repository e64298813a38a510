"""lora_linear and its backward, made of kernels.

===========  =============================================  ========================================
algorithm    forward                                        backward
===========  =============================================  ========================================
``fused``    shrink, gemm_fwd; for a small m gemm_small_m   grad_b, gemm_bwd, grad_a
``addmm``    shrink, expand_y, then cuBLAS adds x·wᵀ to it  grad_b, expand_grad_a, then cuBLAS adds
                                                            dy·w to dx
===========  =============================================  ========================================

If dx or da is not needed, or the rank is high, expand_dx and grad_a replace expand_grad_a. A weight
in another dtype than dy is that of a base layer which multiplies in its own dtype: dy·w is then
PyTorch's product in that dtype, by either algorithm.
Gradients of weight and bias, which LoRA leaves frozen, are PyTorch's own products.
"""

from torch import Tensor

from lora_kernels.kernels.expand import expand_dx, expand_scale_y, expand_y
from lora_kernels.kernels.expand_grad_a import expand_grad_a
from lora_kernels.kernels.expand_grad_a import supports as takes_all_ranks
from lora_kernels.kernels.gemm_bwd import gemm_bwd
from lora_kernels.kernels.gemm_fwd import gemm_fwd
from lora_kernels.kernels.gemm_small_m import gemm_small_m, supports
from lora_kernels.kernels.grad_a import grad_a
from lora_kernels.kernels.grad_b import grad_b
from lora_kernels.kernels.launch import as_rows, on_device_of, with_unit_stride
from lora_kernels.kernels.numerics import Numerics, numerics_of
from lora_kernels.kernels.shrink import shrink
from lora_kernels.reference.linear import shaped_like
from lora_kernels.spec import DoraNeeds, LoraSpec, Needs

__all__ = ["add_product_", "lora_linear_backward", "lora_linear_forward", "of_x_and_a", "output"]


def lora_linear_forward(
    algorithm: str,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    spec: LoraSpec,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """reference.linear.lora_linear_forward by algorithm "fused" or "addmm".

    col_scale [N], for one group, multiplies the columns of y before bias is added.
    """
    x_rows, a = as_rows(x), as_rows(a)
    numerics = numerics_of(x, a, b, narrow=spec.narrow)
    with on_device_of(x):
        if algorithm == "fused" and supports(x_rows.shape[0], b.shape[1], spec.dropout_p, numerics):
            bias = None if bias is None else bias.contiguous()
            operands = x_rows, with_unit_stride(w), a, as_rows(b), bias, seed
            y, h = gemm_small_m(*operands, spec, numerics, col_scale=col_scale)
        else:
            h = shrink(x_rows, a, seed, spec.dropout_p, numerics)
            y = output(algorithm, x_rows, w, h, b, bias, spec, numerics, col_scale)
    return shaped_like(x, y), h


def output(
    algorithm: str,
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    numerics: Numerics,
    col_scale: Tensor | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ, with col_scale as in gemm_fwd. Shapes: as there.

    w, b and bias may have any strides; the rows of x and h have a unit stride.
    """
    w, b = with_unit_stride(w), as_rows(b)
    bias = None if bias is None else bias.contiguous()
    if algorithm == "fused":
        return gemm_fwd(x, w, h, b, bias, spec, numerics, col_scale=col_scale)
    if col_scale is not None:
        return expand_scale_y(x @ w.T, h, b, bias, col_scale, spec, numerics)
    return expand_y(h, b, bias, spec, x.dtype, numerics).addmm_(x, w.T)


def lora_linear_backward(
    algorithm: str,
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
    """reference.linear.lora_linear_backward by algorithm "fused" or "addmm"."""
    dy_rows, x_rows, a = as_rows(dy), as_rows(x), as_rows(a)
    h = h.contiguous() if needs.b else None
    numerics = numerics_of(dy, a, b, narrow=spec.narrow)
    dx = dw = da = db = dbias = None
    with on_device_of(dy):
        if needs.x or needs.a or needs.b:
            dh, db = grad_b(dy_rows, as_rows(b), h, spec, needs.x or needs.a, numerics)
        if needs.x or needs.a:
            operands = dy_rows, x_rows, w, dh, a, seed
            dx, da = of_x_and_a(algorithm, *operands, spec.dropout_p, numerics, needs)
        if needs.w:
            dw = dy_rows.T @ x_rows
        if needs.bias:
            dbias = dy_rows.sum(0)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return [grad for grad in (dx, dw, da, db, dbias) if grad is not None]


def of_x_and_a(
    algorithm: str,
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    needs: Needs | DoraNeeds,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy·w + mask∘(dh·a) and da, if they are needed. Shapes: dy [M, N], x [M, K]."""
    dx = da = None
    if needs.x and algorithm == "fused" and w.dtype == dy.dtype:
        dx = gemm_bwd(dy, with_unit_stride(w), dh, a, seed, dropout_p, numerics)
    elif needs.x:
        if needs.a and takes_all_ranks(len(a), numerics, dy.device):
            dx, da = expand_grad_a(dh, a, x, seed, dropout_p, numerics)
        else:
            dx = expand_dx(dh, a, seed, dropout_p, dy.dtype, numerics)
        add_product_(dx, dy, w)
    if needs.a and da is None:
        da = grad_a(dh, x, seed, dropout_p, a.dtype, numerics)
    return dx, da


def add_product_(out: Tensor, left: Tensor, w: Tensor) -> None:
    """out + left·w in place; in w's dtype, if that is another. Shapes: [M, K], [M, N], [N, K]."""
    if w.dtype == left.dtype:
        out.addmm_(left, with_unit_stride(w))
    else:
        out.add_(left.to(w.dtype) @ with_unit_stride(w))
