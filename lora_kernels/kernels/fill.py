"""out = mask ∘ (scale · left · right) + bias, what cuBLAS then adds the large product to.

One program owns one tile of out: BLOCK_M rows and BLOCK_N columns of one group. The forward fills y
with scaling · h · bᵀ + bias, the backward fills dx with mask ∘ (dh · a). Columns of a disabled
group get the bias alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.dropout import keep_tile, word_threshold
from lora_kernels.kernels.launch import (
    Numerics,
    Skinny,
    cdiv,
    choose_skinny,
    launch,
    rank_block,
)
from lora_kernels.kernels.tiles import (
    add_bias,
    add_low_rank,
    count_tiles,
    locate,
    store_tile,
    swizzle,
)

CONFIGS = {
    "interpreter": dict.fromkeys(("narrow", "wide"), Skinny(64, 64, num_warps=4, num_stages=1)),
    "sm_80": {
        "narrow": Skinny(64, 128, num_warps=8, num_stages=1),
        "narrow_high_rank": Skinny(32, 64, num_warps=4, num_stages=1),
        "wide": Skinny(32, 32, num_warps=4, num_stages=1),
    },
    "sm_90": {
        "narrow": Skinny(128, 128, num_warps=8, num_stages=1),
        "narrow_high_rank": Skinny(64, 128, num_warps=8, num_stages=1),
        "wide": Skinny(64, 64, num_warps=8, num_stages=1),
    },
    "sm_100": {
        "narrow": Skinny(128, 128, num_warps=8, num_stages=1),
        "wide": Skinny(64, 64, num_warps=8, num_stages=1),
    },
    "hip": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=1),
        "wide": Skinny(64, 64, num_warps=4, num_stages=1),
    },
    "other": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=1),
        "wide": Skinny(64, 64, num_warps=4, num_stages=1),
    },
}


@triton.jit(do_not_specialize=["M", "threshold"])
def _fill_kernel(
    left_ptr, right_ptr, bias_ptr, seed_ptr, out_ptr,
    M, R, rank_total, sizes, scale, threshold,
    stride_right, stride_om,
    LAYERS: tl.constexpr, ENABLED: tl.constexpr, RIGHT_T: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    tiles_n = count_tiles(sizes, ENABLED, BLOCK_N)
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, 8)
    row = tl.cast(tile_m, tl.int64) * BLOCK_M
    column, end, right_row, group, enabled = locate(tile_n, sizes, ENABLED, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if enabled:
        # Not unrolled: the masks of several layers at once do not fit into registers.
        for layer in tl.range(LAYERS):
            update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            update = add_low_rank(
                update, left_ptr + tl.cast(layer, tl.int64) * M * R + group * R,
                right_ptr + tl.cast(layer, tl.int64) * R * stride_right, row, right_row, scale,
                rank_total, stride_right, M, right_row + end - column, R,
                RIGHT_T, DTYPE, PRECISION, BLOCK_R, RANK_BLOCKS,
            )  # fmt: skip
            if DROPOUT:
                keep = keep_tile(
                    tl.load(seed_ptr + layer), row, column, threshold, BLOCK_M, BLOCK_N
                )
                update = tl.where(keep, update, 0.0)
            if LAYERS == 1:  # an addition to zeros would stay, one for each element
                acc = update
            else:
                acc += update
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, column, end)
    store_tile(out_ptr, acc, row, column, stride_om, M, end)


def _fill(
    left, right, right_t, bias, seed, scale, dropout_p, sizes, enabled, r, dtype, numerics, config
) -> Tensor:
    (m, rank_total), device = left.shape[-2:], left.device
    config = config or choose_skinny(CONFIGS, device, numerics.update, r)
    out = torch.empty((m, sum(sizes)), dtype=dtype, device=device)
    block_r = rank_block(r, numerics.update)
    rows = cdiv(m, config.BLOCK_ROWS)
    tiles = rows * sum(cdiv(size, config.BLOCK_COLS) for size in sizes)
    launch(
        _fill_kernel, (tiles,),
        left, right, bias, seed, out,
        m, r, rank_total, sizes, scale, word_threshold(dropout_p),
        right.stride(-2), out.stride(0),
        LAYERS=left.shape[:-2].numel(), ENABLED=enabled, RIGHT_T=right_t,
        HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0,
        DTYPE=numerics.update, PRECISION=numerics.update_precision,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_N=config.BLOCK_COLS,
        BLOCK_R=block_r, RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def fill_y(
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    dtype: torch.dtype,
    numerics: Numerics,
    config: Skinny | None = None,
) -> Tensor:
    """scaling·h_g·b_gᵀ + bias. Shapes: h [M, E*r], b [sum of enabled splits, r] -> [M, N]."""
    return _fill(
        h, b, True, bias, None, scaling, 0.0, out_splits, enable_lora, b.shape[1],
        dtype, numerics, config,
    )  # fmt: skip


def fill_dx(
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    numerics: Numerics,
    config: Skinny | None = None,
) -> Tensor:
    """dh·a where kept, else 0; dh carries the mask's scale. Shapes: [M, R], [R, K] -> [M, K].

    For L layers that share x, their sum: dh [L, M, R], a [L, R, K], seed [L] -> [M, K].
    """
    return _fill(
        dh, a, False, None, seed, 1.0, dropout_p, (a.shape[-1],), (True,), a.shape[-2],
        dtype, numerics, config,
    )  # fmt: skip
