"""The mathematics in a few differentiable lines, and random operands for it."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import philox

OPERANDS = ("x", "w", "a", "b", "bias")


def lora_formula(x, w, a, b, bias, *, scaling, mask=None, keep_scale=1.0, groups=None) -> Tensor:
    """y = x·wᵀ + bias + scaling·(x_hat·aᵀ)·bᵀ in the operands' own dtype.

    groups: [(size, enabled), …] of the columns of y; None is one enabled group. mask: bool, [M, K].
    """
    y = F.linear(x, w, bias)
    x_hat = x if mask is None else x * mask.view(x.shape) * keep_scale
    updates, row, rank, r = [], 0, 0, b.shape[1]
    for size, enabled in groups or [(w.shape[0], True)]:
        if enabled:
            h = x_hat.to(a.dtype) @ a[rank : rank + r].T
            updates.append(h.to(b.dtype) @ b[row : row + size].T * scaling)
            row, rank = row + size, rank + r
        else:
            updates.append(y.new_zeros((*y.shape[:-1], size)))
    return y + torch.cat(updates, -1).to(y.dtype)


@dataclasses.dataclass
class Problem:
    """Random operands of one LoRA product, their gradient, and how the columns are grouped."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: Tensor
    scaling: float
    dropout_p: float
    groups: list[tuple[int, bool]]

    @property
    def out_splits(self) -> list[int]:
        return [size for size, _ in self.groups]

    @property
    def enable_lora(self) -> list[bool]:
        return [enabled for _, enabled in self.groups]

    def operands(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}

    def without_cancellation(self) -> "Problem":
        """The same with nothing negative: a lone sum that cancels has no digits to compare."""
        values = {name: getattr(self, name).abs() for name in (*self.operands(), "dy")}
        return dataclasses.replace(self, scaling=abs(self.scaling), **values)

    def mask(self) -> Tensor | None:
        if self.dropout_p == 0:
            return None
        rows = self.x.numel() // self.x.shape[-1]
        return philox.keep_mask(self.seed, rows, self.x.shape[-1], self.dropout_p)

    def solve(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """y and every gradient by PyTorch's autograd, in dtype, or as the operands are."""
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in self.operands().items()
        }
        y = lora_formula(
            *(leaves.get(name) for name in OPERANDS),
            scaling=self.scaling,
            mask=self.mask(),
            keep_scale=philox.keep_scale(self.dropout_p),
            groups=self.groups,
        )
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def make_problem(
    m: int | tuple[int, ...],
    k: int,
    n: int,
    r: int,
    *,
    device,
    dtype=torch.float32,
    lora_dtype=None,
    bias=True,
    dropout_p=0.0,
    scaling=2.0,
    groups=None,
) -> Problem:
    """Operands drawn from torch's generator, the weights at the size that keeps y near one."""
    lead = m if isinstance(m, tuple) else (m,)
    groups = groups or [(n, True)]
    lora_dtype = lora_dtype or dtype

    def draw(shape, std, dtype):
        return (torch.randn(shape) * std).to(device, dtype)

    enabled = [size for size, on in groups if on]
    return Problem(
        x=draw((*lead, k), 1.0, dtype),
        w=draw((n, k), k**-0.5, dtype),
        a=draw((r * len(enabled), k), k**-0.5, lora_dtype),
        b=draw((sum(enabled), r), r**-0.5, lora_dtype),
        bias=draw((n,), 1.0, dtype) if bias else None,
        dy=draw((*lead, n), 1.0, dtype),
        seed=torch.randint(-(2**63), 2**63 - 1, (1,)).to(device),
        scaling=scaling,
        dropout_p=dropout_p,
        groups=groups,
    )
