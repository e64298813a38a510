"""The mathematics in a few differentiable lines, and random operands for it."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.spec import LoraSpec, OutputSplits

__all__ = ["OPERANDS", "Problem", "lora_formula", "make_problem"]

OPERANDS = ("x", "w", "a", "b", "bias")


def lora_formula(x, w, a, b, bias, spec: LoraSpec, mask: Tensor | None = None) -> Tensor:
    """y = x·wᵀ + bias + scaling·(x_hat·aᵀ)·bᵀ in the operands' own dtype.

    mask: what dropout multiplies x by, in x's shape or [M, K]; None drops nothing.
    """
    y = F.linear(x, w, bias)
    x_hat = x if mask is None else x * mask.view(x.shape)
    updates, row, rank, r = [], 0, 0, b.shape[1]
    for size, enabled in zip(spec.splits.sizes, spec.splits.enabled, strict=True):
        if enabled:
            h = x_hat.to(a.dtype) @ a[rank : rank + r].T
            updates.append(h.to(b.dtype) @ b[row : row + size].T * spec.scaling)
            row, rank = row + size, rank + r
        else:
            updates.append(y.new_zeros((*y.shape[:-1], size)))
    return y + torch.cat(updates, -1).to(y.dtype)


@dataclasses.dataclass
class Problem:
    """Random operands of one LoRA product, the gradient dy of its result, its seed and spec."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    seed: Tensor
    spec: LoraSpec

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.spec.scaling

    @property
    def dropout_p(self) -> float:
        """The probability that an element of x is dropped."""
        return self.spec.dropout_p

    @property
    def splits(self) -> OutputSplits:
        """The groups of y's columns."""
        return self.spec.splits

    def operands(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}

    def without_cancellation(self) -> "Problem":
        """The same without negative values: a sum that cancels has no digits left to compare."""
        values = {name: getattr(self, name).abs() for name in (*self.operands(), "dy")}
        spec = dataclasses.replace(self.spec, scaling=abs(self.scaling))
        return dataclasses.replace(self, spec=spec, **values)

    def mask(self) -> Tensor | None:
        """Which elements of x are kept, by the mask's definition: bool [M, K]; None if all."""
        if self.dropout_p == 0:
            return None
        cols = self.x.shape[-1]
        row, col = (torch.arange(n, device=self.x.device) for n in (self.x.numel() // cols, cols))
        return dropout.keep(self.seed, row[:, None], col, self.dropout_p)

    def solve(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """y and every gradient by PyTorch's autograd, in dtype; None takes the operands' own."""
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in self.operands().items()
        }
        mask = self.mask()
        if mask is not None:
            mask = mask.to(leaves["x"].dtype) * dropout.keep_scale(self.dropout_p)
        x, w, a, b, bias = map(leaves.get, OPERANDS)
        y = lora_formula(x, w, a, b, bias, self.spec, mask)
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
    groups: Sequence[tuple[int, bool]] | None = None,
) -> Problem:
    """Operands drawn from torch's generator; weights are scaled so that y is near one.

    groups: (size, enabled) of each group of y's columns; None is one enabled group.
    """
    lead = m if isinstance(m, tuple) else (m,)
    sizes, enabled = zip(*(groups or [(n, True)]), strict=True)
    splits = OutputSplits(sizes, enabled)
    lora_dtype = lora_dtype or dtype

    def draw(shape, std, dtype):
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(shape) * std).to(device, dtype)

    return Problem(
        x=draw((*lead, k), 1.0, dtype),
        w=draw((n, k), k**-0.5, dtype),
        a=draw((r * splits.count, k), k**-0.5, lora_dtype),
        b=draw((splits.rows, r), r**-0.5, lora_dtype),
        bias=draw((n,), 1.0, dtype) if bias else None,
        dy=draw((*lead, n), 1.0, dtype),
        seed=torch.randint(-(2**63), 2**63 - 1, (1,)).to(device),
        spec=LoraSpec(scaling, dropout_p, splits),
    )
