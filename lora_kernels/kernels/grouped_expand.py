"""out += mask ∘ (scale_g · left · right_g) + bias_e, by segments of rows, onto a large product.

One program owns one tile of out: BLOCK_M rows of one segment, and BLOCK_N columns. The forward adds
scaling_g · h · b_gᵀ to y, the backward adds mask ∘ (dh · a_g) to dx. With one weight for all rows,
the large product is whole, and rows without a group stay as they are. With experts, the program
also adds their bias, and rows behind the last end become zeros: nobody has written them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, select, target_of
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, bits_of
from lora_kernels.kernels.segments import (
    GroupMask,
    Routing,
    group_of,
    group_update,
    locate_rows,
    stack_of,
)
from lora_kernels.kernels.tile import Matrix, add_bias, load_tile, store_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32, r=16), SkinnyConfig(32, 32, num_warps=4, num_stages=1)),
        (When(bits=32), SkinnyConfig(32, 32, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(32, 64, num_warps=4, num_stages=1)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=1)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=8, num_stages=1)),
        (When(r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
    ],
)


@triton.jit(do_not_specialize=["S", "Q"])
def _grouped_expand_kernel(
    left_ptr, right, bias, segments, mask, scales, out,
    S, Q, N, R, per_expert,
    EXPERTS: tl.constexpr, RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, col = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n * BLOCK_N
    segment, start, end, row = locate_rows(segments, Q, S, tile, BLOCK_M, BLOCK_Q)
    if row < end:
        group = group_of(segments, Q, segment)
        changes = group >= 0
        if EXPERTS:
            changes = True
        if changes:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if group >= 0:
                acc = group_update(
                    Matrix(left_ptr, R),
                    right,
                    segments,
                    mask,
                    scales,
                    segment,
                    group,
                    start,
                    end,
                    row,
                    col,
                    S,
                    Q,
                    N,
                    R,
                    RIGHT_T,
                    NUMERICS,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    RANK_BLOCKS,
                    BLOCK_Q,
                )
            if segment < Q:
                acc += load_tile(out, row, col, end, N, BLOCK_M, BLOCK_N).to(tl.float32)
                if bias is not None:
                    expert = tl.cast(segment // per_expert, tl.int64)
                    acc = add_bias(acc, bias + expert * N, col, N)
            store_tile(out, acc, row, col, end, N)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select(TILES, target_of(device), bits_of(numerics.update), r=r)


def grouped_expand(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    transposed: bool,
    experts: bool,
    bias: Tensor | None,
    routing: Routing,
    mask: GroupMask | None,
    scales: Tensor | None,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """out, after mask ∘ (scale_g·left·right_g(ᵀ)) + bias_e was added to it in place.

    Shapes: out [S, N]; left [S, R] (h or dh), contiguous; right [G, N, R] if transposed, else
    [G, R, N]; bias [E, N], contiguous; scales [G], None for 1.
    """
    n, r = out.shape[1], left.shape[1]
    config = config or config_for(out.device, r, numerics)
    block_r = rank_block(r, numerics.update)
    launch(
        _grouped_expand_kernel,
        (routing.tiles(config.BLOCK_ROWS) * cdiv(n, config.BLOCK_COLS),),
        left_ptr=left,
        right=stack_of(right),
        bias=bias,
        mask=mask,
        scales=scales,
        out=matrix(out),
        N=n,
        R=r,
        per_expert=routing.per_expert,
        EXPERTS=experts,
        RIGHT_T=transposed,
        NUMERICS=numerics,
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_COLS,
        BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **routing.arguments(),
    )
    return out
