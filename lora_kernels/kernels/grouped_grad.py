"""grad_g = scale_g · leftᵀ · right_hat over the rows of each group g.

da comes from dh and x, dbᵀ from h and dy. One program owns BLOCK_R rows and BLOCK_K columns of the
gradient, for one chunk of rows of one segment. It draws the mask again. Each chunk has a gradient
of its own, and writes which group it belongs to. grouped_reduce adds these in the order of the
rows, and gives zeros to a group without rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.grouped_reduce import grouped_reduce, members_of
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.segments import (
    GroupMask,
    Routing,
    group_of,
    load_rows,
    locate_rows,
    row_of_group,
    source_rows,
)
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_of_terms,
    load_terms,
    split_terms,
    sum_terms,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import Matrix, part_of, store_tile

CHUNK = 512  # rows: a chunk's gradient is written and read once, as float32

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32, r=16), SkinnyConfig(32, 64, num_warps=4, num_stages=3)),
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(scaled=True, r=16), SkinnyConfig(64, 128, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
    ],
    sm_100=[
        (When(bits=32, r=16), SkinnyConfig(32, 64, num_warps=4, num_stages=3)),
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
        (When(terms=True, r=32), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(scaled=True), SkinnyConfig(64, 128, num_warps=8, num_stages=3)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
    hip_wave32=[
        (When(), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["S", "Q", "chunk_rows"])
def _grouped_grad_kernel(
    left, right, index, segments, mask, parts_ptr, group_ptr,
    S, Q, K, R, chunk_rows,
    NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same columns are neighbours: right is in L2
    tiles = ranks * tl.cdiv(K, BLOCK_K)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    k, r = tile // ranks * BLOCK_K, tile % ranks * BLOCK_R
    segment, start, end, first = locate_rows(segments, Q, S, chunk, chunk_rows, BLOCK_Q)
    group = tl.where(first < end, group_of(segments, Q, segment), -1)
    if tile == 0:
        tl.store(group_ptr + chunk, group)
    if group >= 0:
        end = min(end, first + chunk_rows)
        if mask is not None:
            seed, threshold = tl.load(mask.seeds + group), tl.load(mask.thresholds + group)
            mask_row = row_of_group(segments, Q, S, segment, group, first - start, BLOCK_Q)
        DTYPE: tl.constexpr = NUMERICS.main
        IN_DOT: tl.constexpr = tl.float32 != DTYPE
        accs = zeros_of_terms(TERMS, APART, BLOCK_R, BLOCK_K, BELOW=True)
        for step in tl.range(0, tl.cdiv(end - first, BLOCK_M)):
            row = first + step * BLOCK_M
            left_tiles = load_terms(
                left, row, r, end, R, S, False, TERMS, APART, DTYPE, BLOCK_M, BLOCK_R
            )
            rows, inside = source_rows(index, row, end, BLOCK_M)
            right_tile = load_rows(right, rows, inside, k, K, BLOCK_K)
            if mask is not None:
                at = mask_row + step * BLOCK_M
                keep = keep_tile(seed, threshold, at, k, BLOCK_M, BLOCK_K, IN_DOT=IN_DOT)
                right_tile = tl.where(keep, right_tile, 0.0)
            accs = dot_of_terms(accs, left_tiles, right_tile, NUMERICS)
        part = part_of(Matrix(parts_ptr, K), tl.cast(chunk, tl.int64) * R, 0)
        store_tile(part, sum_terms(accs, BLOCK_R, BELOW=True), r, k, R, K)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def grouped_grad(
    left: Tensor,
    right: Tensor,
    groups: int,
    routing: Routing,
    mask: GroupMask | None,
    scales: Tensor | None,
    dtype: torch.dtype,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """scale_g·leftᵀ·(mask ∘ right) over the rows of each group, in dtype.

    Shapes: left [S, R]; right [S, K], or [T, K] with index; scales [G], None for 1 -> [G, R, K].
    """
    k, r = right.shape[1], left.shape[1]
    config = config or config_for(right.device, r, numerics)
    left, terms = split_terms(left, right.dtype, numerics.rank_terms)
    block_r = rank_block(r, numerics.main)
    chunk_rows = chunk_rows or CHUNK
    chunks = routing.tiles(chunk_rows)
    # Not all are written, and no other is read.
    parts = right.new_empty((chunks, r, k), dtype=torch.float32)
    group_of_chunk = torch.empty(chunks, dtype=torch.int32, device=right.device)
    launch(
        _grouped_grad_kernel,
        (chunks * cdiv(k, config.BLOCK_COLS) * cdiv(r, block_r),),
        left=matrix(left),
        right=matrix(right),
        index=routing.x_index,
        mask=mask,
        parts_ptr=parts,
        group_ptr=group_of_chunk,
        K=k,
        R=r,
        chunk_rows=chunk_rows,
        NUMERICS=numerics,
        TERMS=terms,
        APART=are_apart(right.device, block_r),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **routing.arguments(),
    )
    return grouped_reduce(parts, members_of(group_of_chunk, groups), scales, dtype)
