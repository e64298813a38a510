"""Device code that kernels share: tiles in memory, tile order, the products of tiles."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.scaled import powers


class Matrix(NamedTuple):
    """A matrix as a kernel gets it: where it begins, and how many elements apart its rows are.

    Its rows have a unit stride. How many rows and columns there are is an argument of its own.
    """

    ptr: Tensor
    stride: int


@triton.jit
def part_of(matrix, row, col):
    """The matrix that begins at (row, col)."""
    return Matrix(matrix.ptr + tl.cast(row, tl.int64) * matrix.stride + col, matrix.stride)


@triton.jit
def load_tile(
    source, row, col, rows, cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """source[row.., col..] -> [BLOCK_ROWS, BLOCK_COLS], zero beyond rows and cols.

    source: a Matrix, or with TMA a tensor descriptor.
    """
    if TMA:
        tile = source.load([tl.cast(row, tl.int32), tl.cast(col, tl.int32)])
    else:
        offs_row = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_ROWS)
        offs_col = col + tl.arange(0, BLOCK_COLS)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        pointers = source.ptr + offs_row[:, None] * source.stride + offs_col[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(target, tile, row, col, rows, cols, TMA: tl.constexpr = False):
    """target[row.., col..] = tile in target's dtype, up to rows and cols."""
    if TMA:
        target.store([tl.cast(row, tl.int32), tl.cast(col, tl.int32)], tile.to(target.dtype))
    else:
        offs_row = tl.cast(row, tl.int64) + tl.arange(0, tile.shape[0])
        offs_col = col + tl.arange(0, tile.shape[1])
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        pointers = target.ptr + offs_row[:, None] * target.stride + offs_col[None, :]
        tl.store(pointers, tile.to(target.ptr.dtype.element_ty), mask=mask)


@triton.jit
def swizzle(tile, tiles_m, tiles_n, BAND_M: tl.constexpr):
    """The tile-th tile (m, n): down BAND_M rows, then right, so that operands stay in L2."""
    in_band = BAND_M * tiles_n
    first_m = tile // in_band * BAND_M
    height = min(tiles_m - first_m, BAND_M)
    return first_m + tile % in_band % height, tile % in_band // height


@triton.jit
def count_tiles(sizes, ENABLED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles cover the groups of columns, none of them across two groups."""
    tiles = 0
    for g in tl.static_range(len(ENABLED)):
        tiles += tl.cdiv(sizes[g], BLOCK)
    return tiles


@triton.jit
def locate(tile, sizes, ENABLED: tl.constexpr, BLOCK: tl.constexpr):
    """The tile-th tile over the groups: (column, end of the group, row of b, group of h, enabled).

    The row of b and the group of h mean nothing if enabled is 0.
    """
    column, end, b_row, group, enabled = 0, 0, 0, 0, 0
    first, start, b_start, h_group = 0, 0, 0, 0
    for g in tl.static_range(len(ENABLED)):
        inside = tile >= first
        offset = (tile - first) * BLOCK
        column = tl.where(inside, start + offset, column)
        end = tl.where(inside, start + sizes[g], end)
        b_row = tl.where(inside, b_start + offset, b_row)
        group = tl.where(inside, h_group, group)
        enabled = tl.where(inside, 1 if ENABLED[g] else 0, enabled)
        first += tl.cdiv(sizes[g], BLOCK)
        start += sizes[g]
        if ENABLED[g]:
            b_start += sizes[g]
            h_group += 1
    return column, end, b_row, group, enabled


@triton.jit
def matmul(
    left, right, row, col, rows, cols, depth, RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """left[row..] · right[:, col..] in float32: left [rows, depth], right [depth, cols].

    RIGHT_T: right is stored [cols, depth].
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.cdiv(depth, BLOCK_K)):
        k = step * BLOCK_K
        tile = load_tile(left, row, k, rows, depth, BLOCK_M, BLOCK_K, TMA)
        if RIGHT_T:
            other = load_tile(right, col, k, cols, depth, BLOCK_N, BLOCK_K, TMA).T
        else:
            other = load_tile(right, k, col, depth, cols, BLOCK_K, BLOCK_N, TMA)
        tile, other = tile.to(NUMERICS.main), other.to(NUMERICS.main)
        acc = tl.dot(tile, other, acc, input_precision=NUMERICS.update_precision)
    return acc


@triton.jit
def largest_of_rows(
    source, row, rows, cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest |source[row..]| in each row -> [BLOCK_ROWS, 1]; it may be a NaN, or ignore it."""
    largest = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=1):
        tile = load_tile(source, row, block * BLOCK_COLS, rows, cols, BLOCK_ROWS, BLOCK_COLS)
        largest = tl.maximum(largest, tl.max(tl.abs(tile), 1, keep_dims=True))
    return largest


@triton.jit
def add_low_rank(
    acc, left, right, row, right_row, scale, rows, right_end, R,
    RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    """acc + scale · left[row..] · right[:, right_row..]: left [rows, R] (h or dh).

    RIGHT_T: right is stored [.., R] (b), otherwise [R, ..] (a). left is float32, or scale is 1.
    """
    if tl.float16 == NUMERICS.update:
        # All of acc, because a product of its own has no registers beside a large one.
        largest = largest_of_rows(left, row, rows, R, acc.shape[0], BLOCK_R, RANK_BLOCKS)
        up, down = powers(tl.abs(largest * scale))
        acc *= up
    # One stage: factors are read once, and more buffers would come on top of those of the product.
    for block in tl.range(0, RANK_BLOCKS, num_stages=1):
        r = block * BLOCK_R
        tile = load_tile(left, row, r, rows, R, acc.shape[0], BLOCK_R) * scale
        if RIGHT_T:
            other = load_tile(right, right_row, r, right_end, R, acc.shape[1], BLOCK_R).T
        else:
            other = load_tile(right, r, right_row, R, right_end, BLOCK_R, acc.shape[1])
        if tl.float16 == NUMERICS.update:
            tile *= up
        tile, other = tile.to(NUMERICS.update), other.to(NUMERICS.update)
        acc = tl.dot(tile, other, acc, input_precision=NUMERICS.update_precision)
    if tl.float16 == NUMERICS.update:
        acc *= down
    return acc


@triton.jit
def scale_columns(acc, scale, column, end):
    """acc · scale[column..end] in every row; acc itself if scale is None."""
    if scale is not None:
        offs = column + tl.arange(0, acc.shape[1])
        acc *= tl.load(scale + offs, mask=offs < end, other=0.0)[None, :]
    return acc


@triton.jit
def add_bias(acc, bias, column, end):
    """acc + bias[column..end] in every row; acc itself if bias is None."""
    if bias is not None:
        offs = column + tl.arange(0, acc.shape[1])
        acc += tl.load(bias + offs, mask=offs < end, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns; costs no data movement."""
    rows: tl.constexpr = tile.shape[0]
    cols: tl.constexpr = tile.shape[1]
    return tile.reshape(rows, 2, cols // 2).permute(0, 2, 1).split()


@triton.jit
def cut(tile, PARTS: tl.constexpr):
    """A tuple of 1, 2 or 4 parts of a tile's columns, from left to right."""
    parts = (tile,)
    if PARTS >= 4:
        left, right = halves(tile)
        parts = halves(left) + halves(right)
    elif PARTS >= 2:
        parts = halves(tile)
    return parts
