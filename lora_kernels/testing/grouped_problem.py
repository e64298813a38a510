"""Grouped products row by row, in a few differentiable lines, and random operands for them."""

import dataclasses

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.spec import GroupedSpec
from lora_kernels.testing.problem import OPERANDS

__all__ = ["GroupedProblem", "make_grouped_problem"]


@dataclasses.dataclass
class GroupedProblem:
    """Operands of one grouped product, the gradient dy of its result, its routing and spec."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    ends: Tensor
    groups: Tensor | None
    index: Tensor | None
    seeds: Tensor
    spec: GroupedSpec

    def operands(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Group, expert and number in its group of each row; -1: no group, no product."""
        count = len(self.dy)
        group, expert, number = (torch.full((count,), -1) for _ in range(3))
        segments = len(self.ends)
        of_segment = list(range(segments)) if self.groups is None else self.groups.tolist()
        start, seen = 0, dict.fromkeys(of_segment, 0)
        for q, (stop, g) in enumerate(zip(self.ends.tolist(), of_segment, strict=True)):
            group[start:stop] = g
            expert[start:stop] = q // (segments // len(self.w)) if self.w.dim() == 3 else 0
            number[start:stop] = seen[g] + torch.arange(stop - start)
            seen[g] += stop - start
            start = stop
        return group, expert, number

    def formula(self, x, w, a, b, bias) -> Tensor:
        """y, each row by the matrices of its own expert and group, in the operands' dtypes."""
        group, expert, number = (part.to(x.device) for part in self.rows())
        x = x if self.index is None else x[self.index]
        if w.dim() == 2:
            y = x @ w.T if bias is None else x @ w.T + bias
        else:
            y = torch.einsum("sk,snk->sn", x, w[expert])
            y = y if bias is None else y + bias[expert]
            y = torch.where((expert < 0)[:, None], 0, y)
        x_hat = x.to(a.dtype) * self._kept(group, number, a.dtype)
        h = torch.einsum("sk,srk->sr", x_hat, a[group])
        update = torch.einsum("sr,snr->sn", h.to(b.dtype), b[group])
        scaling = torch.tensor([self.spec.scaling(g) for g in range(len(a))], dtype=b.dtype)
        update = update * scaling.to(x.device)[group][:, None]
        return y + torch.where((group < 0)[:, None], 0, update).to(y.dtype)

    def _kept(self, group: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
        """What dropout multiplies each element of x by, by the mask's definition."""
        cols = torch.arange(self.w.shape[-1], device=group.device)
        factors = torch.ones((len(group), len(cols)), dtype=dtype, device=group.device)
        for g in range(len(self.a)):
            p, mine = self.spec.dropout_p(g), group == g
            if p > 0:
                kept = dropout.keep(self.seeds[g], number[mine][:, None], cols, p)
                factors[mine] = kept.to(dtype) * dropout.keep_scale(p)
        return factors

    def solve(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """y and every gradient by PyTorch's autograd, in dtype; None takes the operands' own."""
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_()
            for name, value in self.operands().items()
        }
        y = self.formula(*(leaves.get(name) for name in OPERANDS))
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def make_grouped_problem(
    sizes: tuple[int, ...],
    k: int,
    n: int,
    r: int,
    *,
    device,
    dtype=torch.float32,
    lora_dtype=None,
    experts: int | None = None,
    groups: tuple[int, ...] | None = None,
    behind: int = 0,
    bias=False,
    sources: int | None = None,
    scalings: tuple[float, ...] = (2.0,),
    dropout_ps: tuple[float, ...] = (0.0,),
) -> GroupedProblem:
    """Operands drawn from torch's generator; weights are scaled so that y is near one.

    sizes: rows of each segment. groups: of each segment; None is the q-th for the q-th. behind:
    rows behind the last segment. experts: E of a stack of weights. sources: rows of x if index
    gathers from it.
    """
    lora_dtype = lora_dtype or dtype
    count = len(sizes) if groups is None else max(groups) + 1
    rows = sum(sizes) + behind
    stack = () if experts is None else (experts,)

    def draw(shape, std, dtype):
        return (torch.randn(shape) * std).to(device, dtype)

    index = None if sources is None else torch.randint(sources, (rows,)).to(device)
    return GroupedProblem(
        x=draw((rows if sources is None else sources, k), 1.0, dtype),
        w=draw((*stack, n, k), k**-0.5, dtype),
        a=draw((count, r, k), k**-0.5, lora_dtype),
        b=draw((count, n, r), r**-0.5, lora_dtype),
        bias=draw((*stack, n), 1.0, dtype) if bias else None,
        dy=draw((rows, n), 1.0, dtype),
        ends=torch.tensor(sizes).cumsum(0).to(device, torch.int32),
        groups=None if groups is None else torch.tensor(groups, dtype=torch.int32, device=device),
        index=index,
        seeds=torch.randint(-(2**63), 2**63 - 1, (count,)).to(device),
        spec=GroupedSpec(scalings, dropout_ps),
    )
