"""Operands: all that any launcher may take, for tests, tuning and the gate."""

import functools

import torch
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels import numerics
from lora_kernels.kernels.launch import cdiv
from lora_kernels.kernels.segments import Routing
from lora_kernels.quantization import FourBit
from lora_kernels.reference.grouped_linear import Segment, segments
from lora_kernels.spec import Group, GroupedSpec, LoraSpec
from lora_kernels.testing.grouped_problem import GroupedProblem
from lora_kernels.testing.problem import Problem


class Operands:
    """The operands of a problem whose x and dy are matrices, with h, dh and the mask.

    A kernel gets h and dh from another kernel; here they are random. layers: how many layers share
    x; if there are several, a, seed and dh are stacks.
    """

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    bias: Tensor | None
    seed: Tensor

    def __init__(self, problem: Problem, layers: int = 1):
        self.problem, self.layers = problem, layers
        for name in ("x", "w", "a", "b", "dy", "bias", "seed"):
            setattr(self, name, getattr(problem, name))
        self.numerics = numerics.numerics_of(self.x, self.a, self.b, narrow=self.spec.narrow)
        size = len(self.x), len(self.a)
        self.h: Tensor = _draw(size, self.x.device)
        self.dh: Tensor = _draw(size, self.x.device).to(self.numerics.dh)
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

    @functools.cached_property
    def col_scale(self) -> Tensor:
        """What a magnitude multiplies the columns of y by: [N] float32."""
        return 1 + 0.2 * _draw((self.spec.splits.columns,), self.x.device)

    @functools.cached_property
    def kept(self) -> Tensor:
        """A matrix [M, N] like dy, taken for y."""
        return _draw(tuple(self.dy.shape), self.x.device).to(self.dy.dtype)

    @functools.cached_property
    def four_bit(self) -> FourBit:
        """A weight of w's shape in 4 bits; it has nothing to do with w."""
        n, k = self.w.shape
        return random_four_bit((n, k), self.w.device)

    @functools.cached_property
    def grouped(self) -> "GroupedOperands":
        """The rows in eight segments of four groups and two experts, gathered by an index.

        A segment is nearly twice as long as the one before the last, and groups have two each.
        """
        m, count, device = len(self.x), 4, self.x.device
        ends = [m * (q + 1) * (q + 2) // 72 for q in range(8)]
        int32 = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        weights = {name: torch.stack([getattr(self, name)] * count) for name in "ab"}
        problem = GroupedProblem(
            x=self.x,
            w=self.w.expand(2, *self.w.shape),
            bias=None if self.bias is None else torch.stack([self.bias] * 2),
            dy=self.dy,
            ends=int32(ends),
            groups=int32([0, 1, 2, 3] * 2),
            index=torch.arange(m, device=device).flip(0),
            seeds=torch.cat([self.seed] * count),
            spec=GroupedSpec((self.spec.scaling,), (self.spec.dropout_p,), self.spec.narrow),
            **weights,
        )
        return GroupedOperands(problem)


def random_four_bit(shape: tuple[int, int], device: torch.device, blocksize: int = 64) -> FourBit:
    """A weight of random bytes, with nested statistics."""
    size = shape[0] * shape[1]
    blocks = cdiv(size, blocksize)
    packed, absmax = (
        torch.randint(256, (n,), dtype=torch.uint8, device=device) for n in (cdiv(size, 2), blocks)
    )
    code, code2 = (torch.linspace(-1, 1, n, device=device) for n in (16, 256))
    absmax2 = torch.rand(cdiv(blocks, 256), device=device) + 0.5
    nested = (absmax2, code2, 256, torch.full((), 2.0, device=device))
    return FourBit(packed, absmax, code, blocksize, shape, nested)


class GroupedOperands:
    """The operands of a grouped problem, with h, dh and what a large product left in y and dx."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    seeds: Tensor
    spec: GroupedSpec

    def __init__(self, problem: GroupedProblem):
        self.problem = problem
        for name in ("x", "w", "a", "b", "bias", "dy", "seeds", "spec"):
            setattr(self, name, getattr(problem, name))
        self.numerics = numerics.numerics_of(self.x, self.a, self.b, narrow=self.spec.narrow)
        s, device = len(self.dy), self.x.device
        self.h, dh = (_draw((s, self.a.shape[1]), device) for _ in range(2))
        self.dh = dh.to(self.numerics.dh)
        self.y, self.dx = (_draw((s, c), device).to(self.x.dtype) for c in self.w.shape[-2:])
        experts = self.w.shape[0] if self.w.dim() == 3 else 0
        self.experts = experts > 0
        per_expert = len(problem.ends) // experts if experts else 1
        self.routing = Routing(problem.ends, problem.groups, problem.index, s, per_expert)

    @property
    def without_index(self) -> Routing:
        """The routing of dy, whose rows are those of the batch."""
        return self.routing._replace(x_index=None)

    def segments(self) -> list[Segment]:
        """The segments that have rows."""
        return segments(self.problem.ends, self.problem.groups, self.w)

    def x_rows(self) -> Tensor:
        """The rows of the batch [S, K]."""
        index = self.problem.index
        return self.x if index is None else self.x[index]

    def mask(self, segment: Segment) -> Tensor:
        """1 where an element of a segment's x is kept, and 0 where it is dropped: float32."""
        p, count = self.spec.dropout_p(segment.group), segment.stop - segment.start
        row, col = (torch.arange(n, device=self.x.device) for n in (count, self.x.shape[1]))
        if p == 0:
            return torch.ones(count, len(col), device=self.x.device)
        seed = self.seeds[segment.group]
        return dropout.keep(seed, segment.first + row[:, None], col, p).float()


def copy_of(tensor: Tensor) -> Tensor:
    """A contiguous copy, for a launcher that adds onto what a large product left."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
    make = torch.empty if device.type == "meta" else torch.randn
    return make(shape, device=device)
