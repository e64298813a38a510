"""Rows in segments: how a tile finds its segment on the device, and what launches need for it.

No tile crosses two segments. Grids come from shapes alone: S rows in Q segments, and those behind
the last end, take at most cdiv(S, BLOCK) + Q tiles and one more. Programs past the last tile do
nothing.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.dropout import keep_tile, word_threshold
from lora_kernels.kernels.launch import cdiv
from lora_kernels.kernels.tile import Matrix, add_low_rank
from lora_kernels.spec import GroupedSpec

BLOCK_Q = 256  # how many ends a program looks at in one step


class Segments(NamedTuple):
    """Where segments end, and their groups, as a kernel gets them. Q is an argument of its own.

    ends, groups: int32 [Q]. groups is None if the q-th segment has the q-th group.
    """

    ends: Tensor
    groups: Tensor | None


class Stack(NamedTuple):
    """A stack of matrices, as a kernel gets it: a matrix's rows have a unit stride.

    Of one matrix for all: group_stride 0.
    """

    ptr: Tensor
    group_stride: int
    stride: int


class GroupMask(NamedTuple):
    """The masks of all groups, as a kernel gets them: int64 seeds, int32 word_threshold(p)."""

    seeds: Tensor
    thresholds: Tensor


@triton.jit
def _bounds(segments, Q, S, q):
    """Start and end of segments q; Q is the rows behind the last end. Nothing is beyond S."""
    end = tl.minimum(tl.load(segments.ends + q, mask=q < Q, other=S), S)
    start = tl.load(segments.ends + q - 1, mask=(q > 0) & (q <= Q), other=0)
    start = tl.where(q <= Q, tl.minimum(start, S), S)
    return start, tl.maximum(end, start)


@triton.jit
def locate_rows(segments, Q, S, tile, BLOCK, BLOCK_Q: tl.constexpr):
    """The tile-th tile of BLOCK rows: (segment, its start, its end, the tile's first row).

    The rows behind the last end are segment Q. If there is no such tile, all four are 0.
    """
    segment, start, end, row, seen = 0, 0, 0, 0, 0
    for step in tl.range(0, tl.cdiv(Q + 1, BLOCK_Q)):
        q = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
        starts, ends = _bounds(segments, Q, S, q)
        tiles = tl.cdiv(ends - starts, BLOCK)
        first = seen + tl.cumsum(tiles, 0) - tiles
        here = (tile >= first) & (tile < first + tiles)
        segment += tl.sum(tl.where(here, q, 0), 0)
        start += tl.sum(tl.where(here, starts, 0), 0)
        end += tl.sum(tl.where(here, ends, 0), 0)
        row += tl.sum(tl.where(here, starts + (tile - first) * BLOCK, 0), 0)
        seen += tl.sum(tiles, 0)
    return segment, start, end, row


@triton.jit
def group_of(segments, Q, segment):
    """The group of a segment; -1 for none, and for the rows behind the last end."""
    if segments.groups is None:
        group = tl.where(segment < Q, segment, -1)
    else:
        group = tl.load(segments.groups + segment, mask=segment < Q, other=-1)
    return group


@triton.jit
def row_of_group(segments, Q, S, segment, group, offset, BLOCK_Q: tl.constexpr):
    """How many of the group's rows lie before the offset-th of this segment: the mask's row."""
    before = offset
    if segments.groups is not None:
        for step in tl.range(0, tl.cdiv(segment, BLOCK_Q)):
            q = step * BLOCK_Q + tl.arange(0, BLOCK_Q)
            groups = tl.load(segments.groups + q, mask=q < segment, other=-1)
            starts, ends = _bounds(segments, Q, S, q)
            before += tl.sum(tl.where(groups == group, ends - starts, 0), 0)
    return before.to(tl.int64)


@triton.jit
def of_group(stack, group):
    """The matrix of a group."""
    return Matrix(stack.ptr + tl.cast(group, tl.int64) * stack.group_stride, stack.stride)


@triton.jit
def source_rows(index, row, end, BLOCK: tl.constexpr):
    """Which rows of x are rows row.. of the batch, int64, and which of them lie before end."""
    offs = row + tl.arange(0, BLOCK)
    inside = offs < end
    rows = offs.to(tl.int64) if index is None else tl.load(index + offs, mask=inside, other=0)
    return rows, inside


@triton.jit
def load_rows(source, rows, inside, col, cols, BLOCK_COLS: tl.constexpr):
    """source[rows, col..] -> [len(rows), BLOCK_COLS], zero outside and beyond cols."""
    offs_col = col + tl.arange(0, BLOCK_COLS)
    mask = inside[:, None] & (offs_col < cols)[None, :]
    pointers = source.ptr + rows[:, None] * source.stride + offs_col[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def group_update(
    left, right, segments, mask, scales, segment, group, start, end, row, col, S, Q, N, R,
    RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """mask ∘ (scale_g · left · right_g) for one tile of rows of a group, in float32."""
    scale = 1.0
    if scales is not None:
        scale = tl.load(scales + group)
    update = add_low_rank(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        left,
        of_group(right, group),
        row,
        col,
        scale,
        end,
        N,
        R,
        RIGHT_T,
        NUMERICS,
        BLOCK_R,
        RANK_BLOCKS,
    )
    if mask is not None:
        seed, threshold = tl.load(mask.seeds + group), tl.load(mask.thresholds + group)
        first = row_of_group(segments, Q, S, segment, group, row - start, BLOCK_Q)
        keep = keep_tile(seed, threshold, first, col, BLOCK_M, BLOCK_N)
        update = tl.where(keep, update, 0.0)
    return update


class Routing(NamedTuple):
    """What the launchers take: the segments of S rows, and the rows of x that they are.

    per_expert: how many segments an expert of a stack of weights has.
    """

    ends: Tensor
    groups: Tensor | None
    x_index: Tensor | None
    rows: int
    per_expert: int = 1

    @property
    def segments(self) -> Segments:
        """What a kernel gets."""
        return Segments(self.ends, self.groups)

    def tiles(self, block: int) -> int:
        """The most tiles of so many rows that there may be."""
        return cdiv(self.rows, block) + self.ends.shape[0] + 1

    def arguments(self) -> dict:
        """The arguments that every kernel over segments has."""
        return {
            "segments": self.segments,
            "S": self.rows,
            "Q": self.ends.shape[0],
            "BLOCK_Q": BLOCK_Q,
        }

    def by_expert(self) -> "Routing":
        """The same rows with one segment for each expert, the e-th of group e."""
        ends = self.ends[self.per_expert - 1 :: self.per_expert].contiguous()
        return Routing(ends, None, self.x_index, self.rows)


class GroupNumbers(NamedTuple):
    """The numbers of a GroupedSpec on a device, for each group, as kernels read them.

    keep: keep_scale(p). scaling. scaling_keep: their product. thresholds: for the mask.
    """

    keep: Tensor
    scaling: Tensor
    scaling_keep: Tensor
    thresholds: Tensor


@functools.lru_cache(1024)
def numbers_of(spec: GroupedSpec, groups: int, device: torch.device) -> GroupNumbers:
    """The numbers of the groups, copied to the device once; the host does not wait for the copy."""
    scaling = [spec.scaling(g) for g in range(groups)]
    ps = [spec.dropout_p(g) for g in range(groups)]
    keep = [dropout.keep_scale(p) for p in ps]
    both = [s * k for s, k in zip(scaling, keep, strict=True)]

    def on_device(values: list, dtype: torch.dtype) -> Tensor:
        pinned = device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)

    scales = on_device([keep, scaling, both], torch.float32)
    thresholds = on_device([word_threshold(p) for p in ps], torch.int32)
    return GroupNumbers(scales[0], scales[1], scales[2], thresholds)


def group_mask(spec: GroupedSpec, seeds: Tensor | None, numbers: GroupNumbers) -> GroupMask | None:
    """What a kernel gets for the masks of the groups; None if none drops anything."""
    return GroupMask(seeds, numbers.thresholds) if spec.drops else None


def stack_of(tensor: Tensor) -> Stack:
    """What a kernel gets for [G, rows, cols], or for [rows, cols] that serves every group."""
    return Stack(tensor, tensor.stride(0) if tensor.dim() == 3 else 0, tensor.stride(-2))


def with_unit_rows(factors: Tensor) -> Tensor:
    """Factors [G, .., ..] whose last stride is 1; copies only if it must, so not if expanded."""
    return factors if factors.stride(-1) == 1 else factors.contiguous()
