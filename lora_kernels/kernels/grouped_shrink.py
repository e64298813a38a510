"""h = scale_g · x_hat · a_gᵀ and dh = scale_g · dy · b_g, by segments of rows.

One program owns BLOCK_M rows of one segment, BLOCK_R columns of h and one slice of K. Rows without
a group are not read: their h is 0. The mask of a group counts the group's own rows. If the rows
alone give too few programs, K is cut into slices, and split_k_reduce adds these in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block, split
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.segments import (
    GroupMask,
    Routing,
    group_of,
    load_rows,
    locate_rows,
    of_group,
    row_of_group,
    source_rows,
    stack_of,
)
from lora_kernels.kernels.split_k_reduce import split_k_reduce
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_of_terms,
    load_terms,
    split_terms,
    sum_terms,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import Matrix, part_of, store_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=4, num_stages=3)),
        (When(terms=True, r=16), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(128, 32, num_warps=8, num_stages=2)),
        (When(scaled=True), SkinnyConfig(128, 32, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=8, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32, r=16), SkinnyConfig(64, 32, num_warps=8, num_stages=3)),
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=4, num_stages=3)),
        (When(terms=True, r=32), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
        # Triton 3.6 cannot pipeline three products of one transposed tile.
        (When(terms=True), SkinnyConfig(64, 64, num_warps=4, num_stages=1, programs_per_sm=4)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=3)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
    hip_wave32=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(scaled=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["S", "Q", "rows_of_term"])
def _grouped_shrink_kernel(
    x, index, factors, segments, mask, scales, h_ptr,
    S, Q, K, R, rows_of_term, k_slice,
    FACTOR_T: tl.constexpr, NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same rows are neighbours: x comes from L2
    tile, r = tl.program_id(0) // ranks, tl.program_id(0) % ranks * BLOCK_R
    segment, start, end, row = locate_rows(segments, Q, S, tile, BLOCK_M, BLOCK_Q)
    if row < end:
        group = group_of(segments, Q, segment)
        part = tl.program_id(1)
        first_k = part * k_slice
        # Transposed: x under a mask is in registers, where code for Hopper would overwrite the left
        # operand of a product while it is read. The right one goes through shared memory.
        IN_DOT: tl.constexpr = TERMS > 1 or tl.bfloat16 == NUMERICS.main
        accs = zeros_of_terms(TERMS, APART, BLOCK_R, BLOCK_M, BELOW=True)
        scale = 0.0
        if group >= 0:
            factor = of_group(factors, group)
            rows, inside = source_rows(index, row, end, BLOCK_M)
            if mask is not None:
                seed, threshold = tl.load(mask.seeds + group), tl.load(mask.thresholds + group)
                mask_row = row_of_group(segments, Q, S, segment, group, row - start, BLOCK_Q)
            for step in tl.range(0, tl.cdiv(tl.maximum(min(K - first_k, k_slice), 0), BLOCK_K)):
                k = first_k + step * BLOCK_K
                x_tile = load_rows(x, rows, inside, k, K, BLOCK_K)
                if FACTOR_T:
                    tiles = load_terms(
                        factor, r, k, R, K, rows_of_term,
                        True, TERMS, APART, NUMERICS.main, BLOCK_R, BLOCK_K,
                    )  # fmt: skip
                else:
                    tiles = load_terms(
                        factor, k, r, K, R, rows_of_term,
                        False, TERMS, APART, NUMERICS.main, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                if mask is not None:
                    keep = keep_tile(seed, threshold, mask_row, k, BLOCK_M, BLOCK_K, IN_DOT=IN_DOT)
                    x_tile = tl.where(keep, x_tile, 0.0)
                accs = dot_of_terms(accs, tiles, x_tile.T, NUMERICS, not FACTOR_T)
            scale = tl.load(scales + group)
        h = part_of(Matrix(h_ptr, R), tl.cast(part, tl.int64) * S, 0)
        acc = sum_terms(accs, BLOCK_R, BELOW=True) * scale
        store_tile(h, acc.T, row, r, end, R)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def grouped_shrink(
    x: Tensor,
    factors: Tensor,
    transposed: bool,
    routing: Routing,
    mask: GroupMask | None,
    scales: Tensor,
    dtype: torch.dtype,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """scale_g·(mask ∘ x)·factors_g(ᵀ) of the rows of each group g, in dtype; 0 for all others.

    Shapes: x [S, K], or [T, K] with index; factors [G, R, K] if transposed, else [G, K, R];
    scales [G] -> [S, R].
    """
    s, k = routing.rows, x.shape[1]
    r = factors.shape[1] if transposed else factors.shape[2]
    config = config or config_for(x.device, r, numerics)
    rows_of_term = factors.shape[:-1].numel()
    factors, terms = split_terms(factors, x.dtype, numerics.terms)
    factors = factors[0] if factors.dim() == 4 else factors
    block_r = rank_block(r, numerics.main)
    ranks = cdiv(r, block_r)
    wanted = config.programs_per_sm * num_sms(x.device)
    parts, k_slice = split(k, config.BLOCK_COLS, cdiv(s, config.BLOCK_ROWS) * ranks, wanted)
    h = torch.empty((parts, s, r), dtype=torch.float32, device=x.device)
    launch(
        _grouped_shrink_kernel,
        (routing.tiles(config.BLOCK_ROWS) * ranks, parts),
        x=matrix(x),
        index=routing.x_index,
        factors=stack_of(factors),
        mask=mask,
        scales=scales,
        h_ptr=h,
        K=k,
        R=r,
        rows_of_term=rows_of_term,
        k_slice=k_slice,
        FACTOR_T=transposed,
        NUMERICS=numerics,
        TERMS=terms,
        APART=are_apart(x.device, block_r),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **routing.arguments(),
    )
    return split_k_reduce(h, dtype)
