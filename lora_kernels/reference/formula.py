"""lora_linear and its backward in PyTorch that can be differentiated, batched and recorded.

linear.py computes the same with less memory, but it writes in place. Nothing here does, and nothing
asks for a value. So these functions go wherever an op cannot: under the transforms of torch.func,
into a recorded graph, to tensors of any class and to any device. Notation: see linear.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.reference.linear import accumulate_dtype, part
from lora_kernels.spec import LoraSpec, Needs

__all__ = [
    "dropped", "lora_linear_backward", "lora_linear_forward", "low_rank_input", "with_update",
]  # fmt: skip


def with_update(
    y: Tensor, x_hat: Tensor, a: Tensor, b: Tensor, spec: LoraSpec, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y plus scaling·h·bᵀ in the columns of each enabled group, and h = x_hat·aᵀ.

    Shapes: y [..., N], x_hat [..., K], a [E·r, K], b [rows of the enabled groups, r]
    -> y [..., N], h [..., E·r] in acc.
    """
    a, b = a.to(acc), b.to(acc)
    h = F.linear(x_hat.to(acc), a)
    if spec.splits.enabled == (True,):
        return _plus(y, h, b, spec.scaling), h
    parts, end = [], 0
    for columns, rows, ranks in spec.splits.groups(b.shape[1]):
        parts.append(y[..., end : columns.start])
        end = columns.stop
        parts.append(_plus(y[..., columns], h[..., ranks], b[rows], spec.scaling))
    return torch.cat([*parts, y[..., end:]], dim=-1), h


def dropped(x: Tensor, seed: Tensor | None, dropout_p: float, acc: torch.dtype) -> Tensor:
    """x_hat in acc. Shapes: x [..., K], seed [1] -> [..., K]; row m of the mask is row m of x."""
    x = x.to(acc)
    if dropout_p == 0:
        return x
    cols = x.shape[-1]
    rows = x.numel() // max(1, cols)
    return x * _mask(seed, rows, cols, dropout_p, acc).reshape(x.shape)


def low_rank_input(x: Tensor, a: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """h = x_hat·aᵀ, as linear.low_rank_input specifies it."""
    rows, acc = x.reshape(-1, x.shape[-1]), accumulate_dtype(x.dtype)
    return F.linear(dropped(rows, seed, dropout_p, acc), a.to(acc))


def lora_linear_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    spec: LoraSpec,
) -> tuple[Tensor, Tensor]:
    """What linear.lora_linear_forward specifies, for the same operands."""
    acc = accumulate_dtype(x.dtype)
    x_hat = dropped(x, seed, spec.dropout_p, acc)
    y = F.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype)).to(x.dtype)
    y, h = with_update(y, x_hat, a, b, spec, acc)
    return y, h.reshape(-1, h.shape[-1])


def lora_linear_backward(
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
    """What linear.lora_linear_backward specifies, for the same operands."""
    dy_rows = dy.reshape(-1, dy.shape[-1])
    acc = accumulate_dtype(dy.dtype)
    wide_dy = dy_rows.to(acc)
    groups = [] if b is None else list(spec.splits.groups(b.shape[1]))
    grads, factor = [], None
    if needs.x or needs.a:
        parts = [part(wide_dy, 1, cols) @ part(b, 0, rows).to(acc) for cols, rows, _ in groups]
        dh = torch.cat(parts, dim=1) * spec.scaling
        if spec.dropout_p > 0:
            factor = _mask(seed, dy_rows.shape[0], a.shape[1], spec.dropout_p, acc)
    if needs.x:
        update = dh @ a.to(acc)
        update = update if factor is None else update * factor
        dx = ((dy_rows.to(w.dtype) @ w).to(dy.dtype) + update).to(dy.dtype)
        grads.append(dx.reshape(*dy.shape[:-1], dx.shape[1]))
    if needs.w or needs.a:
        x_rows = x.reshape(-1, x.shape[-1])
    if needs.w:
        grads.append(dy_rows.T @ x_rows)
    if needs.a:
        x_hat = x_rows.to(acc) if factor is None else x_rows.to(acc) * factor
        grads.append((dh.T @ x_hat).to(a.dtype))
    if needs.b:
        parts = [part(wide_dy, 1, cols).T @ part(h, 1, ranks) for cols, _, ranks in groups]
        grads.append((torch.cat(parts, dim=0) * spec.scaling).to(b.dtype))
    if needs.bias:
        grads.append(dy_rows.sum(0))
    return grads


def _plus(y: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (y + F.linear(h, b) * scaling).to(y.dtype)


def _mask(seed: Tensor, rows: int, cols: int, dropout_p: float, acc: torch.dtype) -> Tensor:
    """What multiplies x: 1 / (1 - p) if an element is kept, 0 if not. Shapes: -> [rows, cols]."""
    batched = torch._C._functorch.is_functorch_wrapped_tensor(seed)
    if batched or torch.jit.is_tracing() or seed.device.type not in ("cpu", "cuda", "meta"):
        row = torch.arange(rows, device=seed.device).unsqueeze(1)
        mask = dropout.keep(seed, row, torch.arange(cols, device=seed.device), dropout_p).to(acc)
    else:
        mask = dropout.keep_mask(seed, rows, cols, dropout_p, dtype=acc)
    return mask * dropout.keep_scale(dropout_p)
