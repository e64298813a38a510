"""LoRA with a magnitude in a few differentiable lines, and random operands for it."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.spec import DoraSpec
from lora_kernels.testing import problem
from lora_kernels.testing.problem import Problem, make_problem

__all__ = ["DORA_OPERANDS", "DoraProblem", "dora_formula", "make_dora_problem"]

DORA_OPERANDS = (*problem.OPERANDS, "magnitude")


def dora_formula(
    x, w, a, b, bias, magnitude, spec: DoraSpec, mask: Tensor | None = None, norm=None
) -> Tensor:
    """The formula at the top of reference/dora.py, in the operands' own dtype.

    mask: what dropout multiplies x by, in x's shape or [M, K]; None drops nothing. norm: that of
    the rows of w + scaling·b·a, or None.
    """
    if norm is None:
        norm = torch.linalg.vector_norm(w + spec.scaling * (b @ a).to(w.dtype), dim=1).detach()
    m = magnitude / norm.to(magnitude.dtype)
    x_hat = x if mask is None else x * mask.view(x.shape)
    update = (x_hat.to(a.dtype) @ a.T).to(b.dtype) @ b.T * spec.scaling
    if spec.drops_product:
        y = F.linear(x, w).to(m.dtype) + (m - 1) * F.linear(x_hat, w) + m * update
    else:
        y = m * (F.linear(x, w) + update)
    return (y if bias is None else y + bias).to(x.dtype)


@dataclasses.dataclass
class DoraProblem(Problem):
    """Random operands of one LoRA product with a magnitude."""

    magnitude: Tensor
    spec: DoraSpec

    def operands(self) -> dict[str, Tensor]:
        return {**super().operands(), "magnitude": self.magnitude}

    def scaled_mask(self) -> Tensor | None:
        """What dropout multiplies x by, in float64 [M, K]; None if it drops nothing."""
        mask = self.mask()
        return None if mask is None else mask.double() * dropout.keep_scale(self.dropout_p)

    def solve(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in self.operands().items()
        }
        mask = self.scaled_mask()
        mask = None if mask is None else mask.to(leaves["x"].dtype)
        x, w, a, b, bias, magnitude = map(leaves.get, DORA_OPERANDS)
        y = dora_formula(x, w, a, b, bias, magnitude, self.spec, mask)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def make_dora_problem(*sizes, low_rank_only: bool = False, **options) -> DoraProblem:
    """make_problem with a magnitude near the norms; low_rank_only: of its spec."""
    plain = make_problem(*sizes, **options)
    fields = {name: getattr(plain, name) for name in vars(plain)}
    fields["spec"] = spec = DoraSpec(**vars(plain.spec), low_rank_only=low_rank_only)
    acc = torch.promote_types(plain.w.dtype, torch.float32)
    total = plain.w.to(acc) + spec.scaling * plain.b.to(acc) @ plain.a.to(acc)
    norm = torch.linalg.vector_norm(total, dim=1)
    magnitude = norm * (1 + 0.2 * torch.randn(norm.shape, dtype=acc).to(norm.device))
    return DoraProblem(**fields, magnitude=magnitude.to(plain.a.dtype))
