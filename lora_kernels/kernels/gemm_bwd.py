"""dx = dy · w + mask ∘ (dh · a). One program owns tiles of dx, one after the other.

A tile is BLOCK_M rows and BLOCK_N columns of dx. Without dropout the product of rank R goes into
the accumulator of the large one. With dropout it has to be masked first; that is done for a part of
the tile's columns at a time, so that product and mask fit into registers beside the accumulator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch.algorithm import SMALL_M
from lora_kernels.dispatch.tma import is_tma_compliant, rows_fit_tma
from lora_kernels.kernels.config import GemmConfig, Tiles, When, select, target_of
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import (
    cdiv,
    launch,
    mask,
    matrix,
    num_programs,
    rank_block,
    tma_operand,
)
from lora_kernels.kernels.numerics import Numerics, bits_of
from lora_kernels.kernels.tile import Matrix, add_low_rank, cut, matmul, store_tile, swizzle

TILES = Tiles(
    interpreter=[(When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), GemmConfig(64, 64, 16, num_warps=8, num_stages=3, epilogue_subtile=2)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=4)),
        (When(r=16), GemmConfig(128, 64, 32, num_warps=8, num_stages=4, epilogue_subtile=4)),
        (When(r=64), GemmConfig(64, 64, 32, num_warps=4, num_stages=4, epilogue_subtile=4)),
        (When(), GemmConfig(64, 64, 32, num_warps=4, num_stages=3, epilogue_subtile=4)),
    ],
    sm_90=[
        (When(bits=32), GemmConfig(64, 64, 16, num_warps=4, num_stages=3, epilogue_subtile=2)),
        (When(m=SMALL_M), GemmConfig(64, 64, 64, num_warps=4, num_stages=4)),
        (
            When(tma=True, r=16),
            GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, epilogue_subtile=4),
        ),
        (
            When(tma=True),
            GemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True, epilogue_subtile=2),
        ),
        (When(), GemmConfig(128, 64, 32, num_warps=8, num_stages=3, epilogue_subtile=2)),
    ],
    sm_100=[
        (When(bits=32), GemmConfig(32, 64, 32, num_warps=4, num_stages=3, epilogue_subtile=2)),
        (
            When(m=SMALL_M),
            GemmConfig(64, 128, 64, num_warps=8, num_stages=3, epilogue_subtile=2),
        ),
        (
            When(tma=True, r=16),
            GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, epilogue_subtile=4),
        ),
        (
            When(tma=True),
            GemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True, epilogue_subtile=2),
        ),
        (When(), GemmConfig(128, 64, 32, num_warps=8, num_stages=3, epilogue_subtile=2)),
    ],
    hip=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=2)),
        (When(), GemmConfig(128, 128, 32, num_warps=8, num_stages=2, epilogue_subtile=2)),
    ],
    other=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=2)),
        (When(r=32), GemmConfig(64, 128, 32, num_warps=4, num_stages=3, epilogue_subtile=2)),
        (When(), GemmConfig(64, 128, 32, num_warps=4, num_stages=3, epilogue_subtile=4)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _gemm_bwd_kernel(
    dy, w, dh_ptr, a, mask, dx,
    M, N, K, R,
    W_T: tl.constexpr, NUMERICS: tl.constexpr, TMA: tl.constexpr, TMA_STORE: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr, BAND_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    dh = Matrix(dh_ptr, R)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    if mask is not None:
        seed = tl.load(mask.seed)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        tile_m, tile_k = swizzle(tile, tiles_m, tiles_k, BAND_M)
        row = tl.cast(tile_m, tl.int64) * BLOCK_M
        col = tile_k * BLOCK_N
        acc = matmul(dy, w, row, col, M, K, N, W_T, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        if mask is None:
            acc = add_low_rank(
                acc, dh, a, row, col, 1.0, M, K, R, False, NUMERICS, BLOCK_R, RANK_BLOCKS
            )
            store_tile(dx, acc, row, col, M, K, TMA_STORE)
        else:
            width: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILE
            parts = cut(acc, EPILOGUE_SUBTILE)
            for i in tl.static_range(EPILOGUE_SUBTILE):
                # Adds mask∘(dh·a) to a part of dy·w and stores it.
                part_col = col + i * width
                update = tl.zeros([BLOCK_M, width], tl.float32)
                update = add_low_rank(
                    update,
                    dh,
                    a,
                    row,
                    part_col,
                    1.0,
                    M,
                    K,
                    R,
                    False,
                    NUMERICS,
                    BLOCK_R,
                    RANK_BLOCKS,
                )
                keep = keep_tile(seed, mask.threshold, row, part_col, BLOCK_M, width)
                finished = parts[i] + tl.where(keep, update, 0.0)
                store_tile(dx, finished, row, part_col, M, K, TMA_STORE)


def config_for(dy: Tensor, w: Tensor, r: int, numerics: Numerics) -> GemmConfig:
    """The entry of TILES that serves dy [M, N], w [N, K] and rank r."""
    tma = is_tma_compliant(dy, w) and rows_fit_tma(w.shape[1], dy)
    return select(
        TILES, target_of(dy.device), bits_of(numerics.main), min(dy.shape[0], SMALL_M + 1), r, tma
    )


def gemm_bwd(
    dy: Tensor,
    w: Tensor,
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    config: GemmConfig | None = None,
) -> Tensor:
    """dx = dy·w + mask ∘ (dh·a); dh includes the mask's scale.

    Shapes: dy [M, N], w [N, K] with one unit stride, dh [M, R], a [R, K] -> dx [M, K]; dy
    and a have a unit inner stride.
    """
    (m, n), (r, k) = dy.shape, a.shape
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    w_t = w.stride(1) != 1  # stored [K, N], so transposed for dy·w
    stored = w.T if w_t else w
    block_r = rank_block(r, numerics.update, beside_acc=True)
    config = config or config_for(dy, w, r, numerics)
    block_m, block_n, block_k, tma = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.tma
    subtiles = config.epilogue_subtile if dropout_p > 0 else 1
    tma_store = tma and rows_fit_tma(k, dx)
    tiles = cdiv(m, block_m) * cdiv(k, block_n)
    launch(
        _gemm_bwd_kernel,
        (num_programs(tiles, config, dy.device),),
        dy=tma_operand(dy, block_m, block_k, tma),
        w=tma_operand(stored, *((block_n, block_k) if w_t else (block_k, block_n)), tma),
        dh_ptr=dh,
        a=matrix(a),
        mask=mask(seed, dropout_p),
        dx=tma_operand(dx, block_m, block_n // subtiles, tma_store),
        M=m,
        N=n,
        K=k,
        R=r,
        W_T=w_t,
        NUMERICS=numerics,
        TMA=tma,
        TMA_STORE=tma_store,
        EPILOGUE_SUBTILE=subtiles,
        BAND_M=config.BAND_M,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx
