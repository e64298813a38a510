"""y = x · wᵀ + bias + scaling · h · bᵀ. One program owns tiles of y, one after the other.

A tile is BLOCK_M rows and BLOCK_N columns of one group. The product of rank R goes into the same
accumulator once the loop over K is done, and costs no registers and no shared memory in that loop.
With a magnitude the columns of both are multiplied by col_scale, before bias is added. A value for
each column needs registers, so a tile may be cut for that.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch.algorithm import SMALL_M
from lora_kernels.dispatch.tma import is_tma_compliant, rows_fit_tma
from lora_kernels.kernels.config import GemmConfig, Tiles, When, select, target_of
from lora_kernels.kernels.launch import (
    cdiv,
    launch,
    matrix,
    num_programs,
    rank_block,
    tma_operand,
)
from lora_kernels.kernels.numerics import Numerics, bits_of
from lora_kernels.kernels.tile import (
    Matrix,
    add_bias,
    add_low_rank,
    count_tiles,
    cut,
    locate,
    matmul,
    part_of,
    scale_columns,
    store_tile,
    swizzle,
)
from lora_kernels.spec import LoraSpec

TILES = Tiles(
    interpreter=[(When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=3)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=4)),
        (When(), GemmConfig(128, 128, 32, num_warps=8, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=3)),
        (When(m=SMALL_M), GemmConfig(64, 64, 64, num_warps=4, num_stages=4)),
        (When(tma=True), GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True)),
        (When(), GemmConfig(128, 128, 32, num_warps=8, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=8, num_stages=3)),
        (When(m=SMALL_M), GemmConfig(64, 64, 64, num_warps=8, num_stages=4)),
        (
            When(tma=True),
            GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, epilogue_subtile=2),
        ),
        (When(), GemmConfig(128, 128, 32, num_warps=8, num_stages=3)),
    ],
    hip=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=2)),
        (When(), GemmConfig(128, 128, 32, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), GemmConfig(64, 64, 32, num_warps=4, num_stages=2)),
        (When(m=SMALL_M), GemmConfig(32, 64, 64, num_warps=4, num_stages=2)),
        (When(), GemmConfig(64, 128, 32, num_warps=8, num_stages=3)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _gemm_fwd_kernel(
    x, w, h_ptr, b, bias, col_scale, y,
    M, N, K, R, rank_total, sizes, scaling,
    ENABLED: tl.constexpr, W_T: tl.constexpr, NUMERICS: tl.constexpr,
    TMA: tl.constexpr, TMA_STORE: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr, BAND_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    h = Matrix(h_ptr, rank_total)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = count_tiles(sizes, ENABLED, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = swizzle(tile, tiles_m, tiles_n, BAND_M)
        row = tl.cast(tile_m, tl.int64) * BLOCK_M
        column, end, b_row, group, enabled = locate(tile_n, sizes, ENABLED, BLOCK_N)
        acc = matmul(x, w, row, column, M, N, K, W_T, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        if enabled:
            acc = add_low_rank(
                acc,
                part_of(h, 0, group * R),
                b,
                row,
                b_row,
                scaling,
                M,
                b_row + end - column,
                R,
                True,
                NUMERICS,
                BLOCK_R,
                RANK_BLOCKS,
            )
        if col_scale is None:
            acc = add_bias(acc, bias, column, end)
            store_tile(y, acc, row, column, M, end, TMA_STORE)
        else:
            width: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILE
            parts = cut(acc, EPILOGUE_SUBTILE)
            for i in tl.static_range(EPILOGUE_SUBTILE):
                part_col = column + i * width
                finished = scale_columns(parts[i], col_scale, part_col, end)
                finished = add_bias(finished, bias, part_col, end)
                store_tile(y, finished, row, part_col, M, end, TMA_STORE)


def config_for(x: Tensor, w: Tensor, r: int, spec: LoraSpec, numerics: Numerics) -> GemmConfig:
    """The entry of TILES that serves x [M, K], w [N, K] and rank r."""
    tma = is_tma_compliant(x, w) and rows_fit_tma(w.shape[0], x)
    if tma and w.stride(1) != 1:
        # The first tile of a group begins with it, and TMA wants 16-byte alignment.
        starts = itertools.accumulate(spec.splits.sizes[:-1])
        tma = all(rows_fit_tma(start, x) for start in starts)
    return select(
        TILES, target_of(x.device), bits_of(numerics.main), min(x.shape[0], SMALL_M + 1), r, tma
    )


def gemm_fwd(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    numerics: Numerics,
    config: GemmConfig | None = None,
    col_scale: Tensor | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ in the columns of each enabled group g.

    col_scale multiplies the columns of y before bias is added.
    Shapes: x [M, K], w [N, K] with one unit stride, h [M, E·r] float32,
    b [rows of the enabled groups, r], col_scale [N] float32 -> y [M, N]; x and b have a unit inner
    stride.
    """
    (m, k), (n, r), splits = x.shape, (w.shape[0], b.shape[1]), spec.splits
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    w_t = w.stride(1) == 1  # stored [N, K], so transposed for x·wᵀ
    stored = w if w_t else w.T
    block_r = rank_block(r, numerics.update, beside_acc=True)
    config = config or config_for(x, w, r, spec, numerics)
    block_m, block_n, block_k, tma = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.tma
    subtiles = 1 if col_scale is None else config.epilogue_subtile
    # A tile that the end of its group cuts off, not that of y, must not write what follows.
    whole_tiles = all(size % block_n == 0 for size in splits.sizes[:-1])
    tma_store = tma and whole_tiles and rows_fit_tma(n, y)
    tiles = cdiv(m, block_m) * sum(cdiv(size, block_n) for size in splits.sizes)
    launch(
        _gemm_fwd_kernel,
        (num_programs(tiles, config, x.device),),
        x=tma_operand(x, block_m, block_k, tma),
        w=tma_operand(stored, *((block_n, block_k) if w_t else (block_k, block_n)), tma),
        h_ptr=h,
        b=matrix(b),
        bias=bias,
        col_scale=col_scale,
        y=tma_operand(y, block_m, block_n // subtiles, tma_store),
        M=m,
        N=n,
        K=k,
        R=r,
        rank_total=h.shape[1],
        sizes=splits.sizes,
        scaling=spec.scaling,
        ENABLED=splits.enabled,
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
    return y
