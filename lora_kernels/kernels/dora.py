"""lora_linear with a magnitude and its backward, made of lora_linear's kernels.

m is folded into w and b, or into y and dy, whichever is smaller: with m∘w for w and m∘b for b,
lora_linear is what the magnitude asks for, and so are dx and da of its backward. The kernels of
lora_linear know of no m yet, and of no x_hat in the product with w: if spec.drops_product,
PyTorch's operators compute all but the norms.
"""

import torch
from torch import Tensor

from lora_kernels.kernels import linear
from lora_kernels.kernels.launch import as_rows, on_device_of, with_unit_stride
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.kernels.weight_norm import weight_norm
from lora_kernels.reference import dora as reference
from lora_kernels.reference.dora import magnitude_gradient, scale_of
from lora_kernels.spec import DoraNeeds, DoraSpec, Needs

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
        numerics = numerics_of(w, a, b)
        norm = weight_norm(with_unit_stride(w), as_rows(a), as_rows(b), spec.scaling, numerics)
        if spec.drops_product:
            return reference.dora_forward(x, w, a, b, bias, magnitude, seed, spec, norm)
        m = scale_of(magnitude, norm)
        if _folds_weight(x, w):
            operands = x, _scaled(w, m), a, _scaled(b, m), bias, seed
            y, h = linear.lora_linear_forward(algorithm, *operands, spec)
        else:
            z, h = linear.lora_linear_forward(algorithm, x, w, a, b, None, seed, spec)
            y = z.copy_(z * m if bias is None else torch.addcmul(bias.to(m.dtype), z, m))
    return [y, h, norm]


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
    if spec.drops_product:
        operands = dy, x, h, w, a, b, bias, magnitude, seed, norm, kept
        return reference.dora_backward(*operands, spec, needs)
    with on_device_of(dy):
        m, dx, dmagnitude = scale_of(magnitude, norm), [], []
        rest, own_w, own_b = Needs(*needs[:5]), w, None if b is None else _scaled(b, m)
        if needs.x and _folds_weight(dy, w):
            own_w = _scaled(w, m)
        elif needs.x:
            # By itself: what dy loses as it is rounded with m in it, da and db do not lose.
            dz, of_x = dy * m.to(dy.dtype), Needs(x=True)
            dx = linear.lora_linear_backward(algorithm, dz, None, None, w, a, b, seed, spec, of_x)
            rest = rest._replace(x=False)
        operands = dy, x, h, own_w, a, own_b, seed
        grads = rest.spread(linear.lora_linear_backward(algorithm, *operands, spec, rest))
        grads = [
            _scaled(grad, m) if name in ("w", "b") and grad is not None else grad
            for name, grad in zip(rest._fields, grads, strict=True)
        ]
        if needs.magnitude:
            dy_rows, rows = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
            operands = dy_rows.to(m.dtype), rows, h, w, b, bias, m, norm, kept
            dmagnitude = [magnitude_gradient(*operands, spec).to(magnitude.dtype)]
    return [grad for grad in (*dx, *grads, *dmagnitude) if grad is not None]


def _folds_weight(rows: Tensor, w: Tensor) -> bool:
    """Whether w is smaller than the matrix of y. Shapes: rows [..., K or N]."""
    return rows.numel() // rows.shape[-1] > w.shape[1]


def _scaled(matrix: Tensor, m: Tensor) -> Tensor:
    """m∘matrix, by rows, in its dtype. Shapes: [N, anything], [N]."""
    return (matrix * m[:, None]).to(matrix.dtype)
