"""y = x · wᵀ + bias + scaling · h · bᵀ. One program owns tiles of y, one after the other.

A tile is BLOCK_M rows and BLOCK_N columns of one group. The product of rank R goes into the same
accumulator once the loop over K is done, where it costs neither registers nor shared memory.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import (
    Gemm,
    Numerics,
    cdiv,
    choose_gemm,
    fits_tma,
    launch,
    operand,
    programs,
    rank_block,
)
from lora_kernels.kernels.tiles import (
    add_bias,
    add_low_rank,
    count_tiles,
    locate,
    matmul,
    store_tile,
    swizzle,
)

CONFIGS = {
    "interpreter": dict.fromkeys(("float32", "few_rows", "pointer"), Gemm(64, 64, 64, 4, 1)),
    "sm_80": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=3),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=4),
        "pointer": Gemm(128, 128, 32, num_warps=8, num_stages=3),
    },
    "sm_90": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=3),
        "few_rows": Gemm(64, 64, 64, num_warps=4, num_stages=4),
        "pointer": Gemm(128, 128, 32, num_warps=8, num_stages=3),
        "tma": Gemm(128, 256, 64, num_warps=8, num_stages=3, tma=True),
    },
    "sm_100": {
        "float32": Gemm(64, 32, 32, num_warps=8, num_stages=3),
        "few_rows": Gemm(64, 64, 64, num_warps=8, num_stages=4),
        "pointer": Gemm(128, 128, 32, num_warps=8, num_stages=3),
        "tma": Gemm(128, 256, 64, num_warps=8, num_stages=3, tma=True),
    },
    "hip": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=2),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=2),
        "pointer": Gemm(128, 128, 32, num_warps=8, num_stages=2),
    },
    "other": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=2),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=2),
        "pointer": Gemm(64, 128, 32, num_warps=4, num_stages=3),
    },
}


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    x, w, h_ptr, b_ptr, bias_ptr, y,
    M, N, K, R, rank_total, sizes, scaling,
    stride_xm, stride_w, stride_bn, stride_ym,
    ENABLED: tl.constexpr, W_T: tl.constexpr, HAS_BIAS: tl.constexpr,
    MAIN_DTYPE: tl.constexpr, UPDATE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = count_tiles(sizes, ENABLED, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        row = tl.cast(tile_m, tl.int64) * BLOCK_M
        column, end, b_row, group, enabled = locate(tile_n, sizes, ENABLED, BLOCK_N)
        acc = matmul(
            x, w, row, column, stride_xm, stride_w, M, N, K,
            W_T, MAIN_DTYPE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
        if enabled:
            acc = add_low_rank(
                acc, h_ptr + group * R, b_ptr, row, b_row, scaling,
                rank_total, stride_bn, M, b_row + end - column, R,
                True, UPDATE_DTYPE, PRECISION, BLOCK_R, RANK_BLOCKS,
            )  # fmt: skip
        if HAS_BIAS:
            acc = add_bias(acc, bias_ptr, column, end)
        store_tile(y, acc, row, column, stride_ym, M, end, TMA_STORE)


def forward(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    numerics: Numerics,
    config: Gemm | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ in the columns of each enabled group g.

    Shapes: x [M, K], w [N, K] with one unit stride, h [M, E*r] float32,
    b [sum of enabled splits, r] -> y [M, N]; x and b have a unit inner stride.
    """
    m, k = x.shape
    n, r = w.shape[0], b.shape[1]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    w_t = w.stride(1) == 1  # stored [N, K], so transposed for x·wᵀ
    stored = w if w_t else w.T
    block_r = rank_block(r, numerics.update, beside_acc=True)
    # A tile of w stored [K, N] begins with a group, and a descriptor at multiples of 16 bytes.
    starts = itertools.accumulate(out_splits[:-1])
    fits = fits_tma(x, stored, y) and (w_t or all(s * x.element_size() % 16 == 0 for s in starts))
    config = config or choose_gemm(CONFIGS, m, r, x, fits)
    block_m, block_n, block_k, tma = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.tma
    # A tile that ends with its group, not with y, must not write the columns behind it.
    whole_tiles = all(size % block_n == 0 for size in out_splits[:-1])
    tma_store = tma and whole_tiles and fits_tma(y)
    tiles = cdiv(m, block_m) * sum(cdiv(size, block_n) for size in out_splits)
    launch(
        _forward_kernel, (programs(tiles, config, x.device),),
        operand(x, block_m, block_k, tma),
        operand(stored, *((block_n, block_k) if w_t else (block_k, block_n)), tma),
        h, b, bias,
        operand(y, block_m, block_n, tma_store),
        m, n, k, r, h.shape[1], out_splits, scaling,
        x.stride(0), stored.stride(0), b.stride(0), n,
        ENABLED=enable_lora, W_T=w_t, HAS_BIAS=bias is not None,
        MAIN_DTYPE=numerics.main, UPDATE_DTYPE=numerics.update, PRECISION=numerics.update_precision,
        TMA=tma, TMA_STORE=tma_store, GROUP_M=config.GROUP_M,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=block_r, RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
