"""The measurements that ship: the fastest algorithm by GPU and GEMM shape."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["TABLE", "GemmShape", "TuningEntry"]


class GemmShape(NamedTuple):
    """What an algorithm is chosen by: x [m, k], w [n, k], rank r, and how they are stored.

    tma: whether tensor descriptors can describe the large operands, see tma.py. backward: whether
    the large product is dy·w, to which a masked update is added, instead of x·wᵀ. uniform: whether
    the factors have dtype, too.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    device: torch.device
    dropout: bool = False
    tma: bool = True
    backward: bool = False
    uniform: bool = True


@dataclass(frozen=True)
class TuningEntry:
    """This algorithm was the fastest on a GPU of this capability for products within the bounds."""

    capability: tuple[int, int]
    dtype: torch.dtype
    algorithm: str
    source: str  # the result file
    m: tuple[float, float] = (1, math.inf)
    n: tuple[float, float] = (1, math.inf)
    k: tuple[float, float] = (1, math.inf)
    r: tuple[float, float] = (1, math.inf)
    dropout: bool | None = None  # None, here and below: either
    tma: bool | None = True
    backward: bool | None = None
    uniform: bool | None = True

    def holds(self, shape: GemmShape, capability: tuple[int, int]) -> bool:
        # Every call asks every row, so the fields in which most rows differ come first.
        return (
            self.n[0] <= shape.n <= self.n[1]
            and self.k[0] <= shape.k <= self.k[1]
            and self.m[0] <= shape.m <= self.m[1]
            and self.r[0] <= shape.r <= self.r[1]
            and self.backward in (None, shape.backward)
            and self.dropout in (None, shape.dropout)
            and self.tma in (None, shape.tma)
            and self.uniform in (None, shape.uniform)
            and self.dtype == shape.dtype
            and self.capability == capability
        )


# Filled by measurement; the first row that holds decides.
TABLE: tuple[TuningEntry, ...] = ()
