"""out = left · w_e + bias_e + mask ∘ (scale_g · update_left · right_g), by segments of rows.

One program owns one tile of out: BLOCK_M rows of one segment, and BLOCK_N columns. The forward
makes y out of x, wᵀ, h and bᵀ, the backward makes dx out of dy, w, dh and a. w is one matrix for
all rows, or one for each expert. With experts, rows behind the last end are zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import GemmConfig, Tiles, When
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.segments import (
    GroupMask,
    Routing,
    group_of,
    group_update,
    load_rows,
    locate_rows,
    of_group,
    source_rows,
    stack_of,
)
from lora_kernels.kernels.tile import Matrix, add_bias, load_tile, store_tile

TILES = Tiles(
    interpreter=[(When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32, r=16), GemmConfig(64, 32, 32, num_warps=4, num_stages=2)),
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=8, num_stages=2)),
        (When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32, r=16), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=8, num_stages=2)),
        (When(), GemmConfig(64, 128, 64, num_warps=8, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(), GemmConfig(64, 128, 64, num_warps=8, num_stages=3)),
    ],
    hip=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=2)),
    ],
    other=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=8, num_stages=2)),
        (When(scaled=True), GemmConfig(64, 64, 32, num_warps=8, num_stages=2)),
        (When(), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["S", "Q"])
def _grouped_gemm_kernel(
    left, index, w, bias, update_left_ptr, right, segments, mask, scales, out,
    S, Q, N, K, R, per_expert,
    EXPERTS: tl.constexpr, W_T: tl.constexpr, RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, col = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n * BLOCK_N
    segment, start, end, row = locate_rows(segments, Q, S, tile, BLOCK_M, BLOCK_Q)
    if row < end:
        group = group_of(segments, Q, segment)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        multiplies = True
        expert = tl.cast(0, tl.int64)
        if EXPERTS:
            multiplies = segment < Q
            expert += segment // per_expert
        if multiplies:
            weight = of_group(w, expert)
            rows, inside = source_rows(index, row, end, BLOCK_M)
            for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
                k = step * BLOCK_K
                tile_left = load_rows(left, rows, inside, k, K, BLOCK_K)
                if W_T:
                    tile_w = load_tile(weight, col, k, N, K, BLOCK_N, BLOCK_K).T
                else:
                    tile_w = load_tile(weight, k, col, K, N, BLOCK_K, BLOCK_N)
                tile_left, tile_w = tile_left.to(NUMERICS.main), tile_w.to(NUMERICS.main)
                acc = tl.dot(tile_left, tile_w, acc, input_precision=NUMERICS.update_precision)
            if bias is not None:
                acc = add_bias(acc, bias + expert * N, col, N)
        if group >= 0:
            acc += group_update(
                Matrix(update_left_ptr, R),
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
        store_tile(out, acc, row, col, end, N)


def config_for(device: torch.device, r: int, numerics: Numerics) -> GemmConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def grouped_gemm(
    left: Tensor,
    w: Tensor,
    bias: Tensor | None,
    update_left: Tensor,
    right: Tensor,
    transposed: bool,
    routing: Routing,
    mask: GroupMask | None,
    scales: Tensor | None,
    numerics: Numerics,
    config: GemmConfig | None = None,
) -> Tensor:
    """left·w_e + bias_e + mask ∘ (scale_g·update_left·right_g(ᵀ)) in left's dtype.

    Shapes: left [S, K], or [T, K] with index; w [K, N] or [E, K, N] with one unit stride in each
    matrix; bias [N] or [E, N], contiguous; update_left [S, R] (h or dh), contiguous; right
    [G, N, R] if transposed, else [G, R, N]; scales [G], None for 1 -> [S, N].
    """
    (k, n), r = w.shape[-2:], update_left.shape[1]
    config = config or config_for(left.device, r, numerics)
    block_r = rank_block(r, numerics.update, beside_acc=True)
    out = torch.empty((routing.rows, n), dtype=left.dtype, device=left.device)
    w_t = w.stride(-1) != 1  # stored [N, K]
    launch(
        _grouped_gemm_kernel,
        (routing.tiles(config.BLOCK_M) * cdiv(n, config.BLOCK_N),),
        left=matrix(left),
        index=routing.x_index,
        w=stack_of(w.mT if w_t else w),
        bias=bias,
        update_left_ptr=update_left,
        right=stack_of(right),
        mask=mask,
        scales=scales,
        out=matrix(out),
        N=n,
        K=k,
        R=r,
        per_expert=routing.per_expert,
        EXPERTS=w.dim() == 3,
        W_T=w_t,
        RIGHT_T=transposed,
        NUMERICS=numerics,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **routing.arguments(),
    )
    return out
