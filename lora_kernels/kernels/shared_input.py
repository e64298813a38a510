"""lora_shared_linear and its backward, for layers that share x, made of kernels.

x is read once for every h and once for every da, and dx is accumulated in place.

===========  =======================================  =============================================
algorithm    forward                                  backward
===========  =======================================  =============================================
``fused``    shrink; for each layer gemm_fwd          for each layer grad_b; expand_dx, to which
``addmm``    shrink; for each layer expand_y, cuBLAS  cuBLAS adds each layer's dy·w; grad_a
===========  =======================================  =============================================
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.kernels.expand import expand_dx
from lora_kernels.kernels.grad_a import grad_a
from lora_kernels.kernels.grad_b import grad_b
from lora_kernels.kernels.launch import as_rows, on_device_of, with_unit_stride
from lora_kernels.kernels.linear import output
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.kernels.shrink import shrink
from lora_kernels.reference.linear import shaped_like
from lora_kernels.spec import LoraSpec, Needs

__all__ = ["lora_shared_linear_backward", "lora_shared_linear_forward"]


def lora_shared_linear_forward(
    algorithm: str,
    x: Tensor,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    specs: Sequence[LoraSpec],
) -> list[Tensor]:
    """reference.shared_input.lora_shared_linear_forward by algorithm "fused" or "addmm"."""
    x_rows, a = as_rows(x), a.contiguous()
    numerics = numerics_of(x, a, *bs, narrow=specs[0].narrow)
    with on_device_of(x):
        h = shrink(x_rows, a, seeds, specs[0].dropout_p, numerics)
        ys = [
            shaped_like(x, output(algorithm, x_rows, w, h_l, b, bias, spec, numerics))
            for h_l, w, b, bias, spec in zip(h, ws, bs, biases, specs, strict=True)
        ]
    return [*ys, h]


def lora_shared_linear_backward(
    algorithm: str,
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    seeds: Tensor | None,
    specs: Sequence[LoraSpec],
    needs: Needs,
) -> list[Tensor]:
    """reference.shared_input.lora_shared_linear_backward; both algorithms are the same here."""
    dy_rows, x_rows, a = [as_rows(dy) for dy in dys], as_rows(x), a.contiguous()
    hs = h.contiguous() if needs.b else [None] * len(dys)
    numerics = numerics_of(dys[0], a, *bs, narrow=specs[0].narrow)
    dropout_p = specs[0].dropout_p
    needs_dh = needs.x or needs.a
    grads: list[Tensor] = []
    with on_device_of(dys[0]):
        if needs_dh or needs.b:
            made = [
                grad_b(dy, as_rows(b), h_l, spec, needs_dh, numerics)
                for dy, b, h_l, spec in zip(dy_rows, bs, hs, specs, strict=True)
            ]
            dhs, dbs = zip(*made, strict=True)
        if needs_dh:
            dh = torch.stack(dhs)  # [L, M, r]
        if needs.x:
            dx = expand_dx(dh, a, seeds, dropout_p, dys[0].dtype, numerics)
            for dy, w in zip(dy_rows, ws, strict=True):
                dx.addmm_(dy, with_unit_stride(w))
            grads.append(dx.view(*dys[0].shape[:-1], dx.shape[1]))
        if needs.w:
            grads += [dy.T @ x_rows for dy in dy_rows]
        if needs.a:
            grads.append(grad_a(dh, x_rows, seeds, dropout_p, a.dtype, numerics))
        if needs.b:
            grads += dbs
        if needs.bias:
            grads += [dy.sum(0) for dy in dy_rows]
    return grads
