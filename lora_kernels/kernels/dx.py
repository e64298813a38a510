"""dx = dy · w + mask ∘ (dh · a). One program owns tiles of dx, one after the other.

A tile is BLOCK_M rows and BLOCK_N columns of dx. Without dropout the product of rank R goes into
the accumulator of the large one. With dropout it has to be masked first; that is done a piece of
the tile's columns at a time, so that product and mask fit into registers beside the accumulator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.dropout import keep_tile, word_threshold
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
    add_low_rank,
    halves,
    matmul,
    store_tile,
    swizzle,
)

CONFIGS = {
    "interpreter": dict.fromkeys(("float32", "few_rows", "pointer"), Gemm(64, 64, 64, 4, 1)),
    "sm_80": {
        "float32": Gemm(64, 64, 16, num_warps=8, num_stages=3, pieces=2),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=4),
        "pointer": Gemm(128, 64, 32, num_warps=8, num_stages=4, pieces=4),
        "pointer_high_rank": Gemm(64, 64, 32, num_warps=4, num_stages=4, pieces=4),
    },
    "sm_90": {
        "float32": Gemm(64, 64, 16, num_warps=4, num_stages=3, pieces=2),
        "few_rows": Gemm(64, 64, 64, num_warps=4, num_stages=4),
        "pointer": Gemm(128, 64, 32, num_warps=8, num_stages=3, pieces=2),
        "tma": Gemm(128, 256, 64, num_warps=8, num_stages=3, tma=True, pieces=4),
        "tma_high_rank": Gemm(128, 128, 64, num_warps=8, num_stages=4, tma=True, pieces=2),
    },
    "sm_100": {
        "float32": Gemm(32, 64, 32, num_warps=4, num_stages=3, pieces=2),
        "few_rows": Gemm(64, 128, 64, num_warps=8, num_stages=3),
        "pointer": Gemm(128, 64, 32, num_warps=8, num_stages=3, pieces=2),
        "tma": Gemm(128, 256, 64, num_warps=8, num_stages=3, tma=True, pieces=4),
        "tma_high_rank": Gemm(128, 128, 64, num_warps=8, num_stages=4, tma=True, pieces=2),
    },
    "hip": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=2),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=2),
        "pointer": Gemm(128, 128, 32, num_warps=8, num_stages=2, pieces=2),
    },
    "other": {
        "float32": Gemm(64, 64, 32, num_warps=4, num_stages=2),
        "few_rows": Gemm(32, 64, 64, num_warps=4, num_stages=2),
        "pointer": Gemm(64, 128, 32, num_warps=4, num_stages=3, pieces=2),
    },
}


@triton.jit
def _finish(
    acc, dh_ptr, a_ptr, dx, seed, row, col, M, K, R, threshold, stride_ar, stride_dxm,
    UPDATE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, TMA_STORE: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds mask∘(dh·a) to a piece of dy·w and stores it."""
    update = tl.zeros([acc.shape[0], acc.shape[1]], tl.float32)
    update = add_low_rank(
        update, dh_ptr, a_ptr, row, col, 1.0, R, stride_ar, M, K, R,
        False, UPDATE_DTYPE, PRECISION, BLOCK_R, RANK_BLOCKS,
    )  # fmt: skip
    keep = keep_tile(seed, row, col, threshold, acc.shape[0], acc.shape[1])
    store_tile(dx, acc + tl.where(keep, update, 0.0), row, col, stride_dxm, M, K, TMA_STORE)


@triton.jit(do_not_specialize=["M", "threshold"])
def _dx_kernel(
    dy, w, dh_ptr, a_ptr, seed_ptr, dx,
    M, N, K, R, threshold,
    stride_dym, stride_w, stride_ar, stride_dxm,
    W_T: tl.constexpr, DROPOUT: tl.constexpr,
    MAIN_DTYPE: tl.constexpr, UPDATE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = swizzle(tile, tiles_m, tiles_k, GROUP_M)
        row = tl.cast(tile_m, tl.int64) * BLOCK_M
        col = tile_k * BLOCK_N
        acc = matmul(
            dy, w, row, col, stride_dym, stride_w, M, K, N,
            W_T, MAIN_DTYPE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
        if not DROPOUT:
            acc = add_low_rank(
                acc, dh_ptr, a_ptr, row, col, 1.0, R, stride_ar, M, K, R,
                False, UPDATE_DTYPE, PRECISION, BLOCK_R, RANK_BLOCKS,
            )  # fmt: skip
            store_tile(dx, acc, row, col, stride_dxm, M, K, TMA_STORE)
        else:
            width: tl.constexpr = BLOCK_N // PIECES
            pieces = (acc,)
            if PIECES >= 2:
                pieces = halves(acc)
            if PIECES >= 4:
                pieces = halves(pieces[0]) + halves(pieces[1])
            for i in tl.static_range(PIECES):
                _finish(
                    pieces[i], dh_ptr, a_ptr, dx, seed, row, col + i * width,
                    M, K, R, threshold, stride_ar, stride_dxm,
                    UPDATE_DTYPE, PRECISION, TMA_STORE, BLOCK_R, RANK_BLOCKS,
                )  # fmt: skip


def dx(
    dy: Tensor,
    w: Tensor,
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    config: Gemm | None = None,
) -> Tensor:
    """dx = dy·w + (dh·a where kept); dh carries the mask's scale.

    Shapes: dy [M, N], w [N, K] with one unit stride, dh [M, R], a [R, K] -> dx [M, K]; dy
    and a have a unit inner stride.
    """
    m, n = dy.shape
    r, k = a.shape
    out = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    w_t = w.stride(1) != 1  # stored [K, N], so transposed for dy·w
    stored = w.T if w_t else w
    block_r = rank_block(r, numerics.update, beside_acc=True)
    config = config or choose_gemm(CONFIGS, m, r, dy, fits_tma(dy, stored, out))
    block_m, block_n, block_k, tma = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.tma
    pieces = config.pieces if dropout_p > 0 else 1
    tma_store = tma and fits_tma(out)
    tiles = cdiv(m, block_m) * cdiv(k, block_n)
    launch(
        _dx_kernel, (programs(tiles, config, dy.device),),
        operand(dy, block_m, block_k, tma),
        operand(stored, *((block_n, block_k) if w_t else (block_k, block_n)), tma),
        dh, a, seed,
        operand(out, block_m, block_n // pieces, tma_store),
        m, n, k, r, word_threshold(dropout_p),
        dy.stride(0), stored.stride(0), a.stride(0), k,
        W_T=w_t, DROPOUT=dropout_p > 0,
        MAIN_DTYPE=numerics.main, UPDATE_DTYPE=numerics.update, PRECISION=numerics.update_precision,
        TMA=tma, TMA_STORE=tma_store, PIECES=pieces, GROUP_M=config.GROUP_M,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=block_r, RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
