"""Operands: all that any launcher may take, for tests, tuning and the gate."""

import functools

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels import numerics
from lora_kernels.spec import Group, LoraSpec
from lora_kernels.testing.problem import Problem


class Operands:
    """The operands of a problem whose x and dy are matrices, with h, dh and the mask.

    A kernel gets h and dh from another kernel; here they are random. layers: how many layers share
    x; if there are several, a, seed and dh are stacks.
    """

    def __init__(self, problem: Problem, layers: int = 1):
        self.problem, self.layers = problem, layers
        for name in ("x", "w", "a", "b", "dy", "bias", "seed"):
            setattr(self, name, getattr(problem, name))
        self.numerics = numerics.numerics_of(self.x, self.a, self.b)
        m, ranks = len(self.x), len(self.a)
        self.h, dh = (_draw((m, ranks), self.x.device) for _ in range(2))
        self.dh = dh.to(self.numerics.dh)
        if layers > 1:
            self.a, self.dh = (torch.stack([t] * layers) for t in (self.a, self.dh))
            self.seed = torch.cat([self.seed] * layers)

    @property
    def spec(self) -> LoraSpec:
        """Scaling, dropout and the groups of y's columns."""
        return self.problem.spec

    @property
    def r(self) -> int:
        """The rank of a group."""
        return self.b.shape[1]

    @functools.cached_property
    def mask(self) -> Tensor:
        """1 where an element of x is kept and 0 where it is dropped: float32 [M, K]."""
        mask = self.problem.mask()
        return torch.ones_like(self.x, dtype=torch.float32) if mask is None else mask.float()

    @property
    def keep_scale(self) -> float:
        """1 / (1 - p) for the p of the mask."""
        return dropout.keep_scale(self.spec.dropout_p)

    def groups(self) -> list[Group]:
        """The enabled groups."""
        return list(self.spec.splits.groups(self.r))


def _draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
    make = torch.empty if device.type == "meta" else torch.randn
    return make(shape, device=device)
