"""da = dhᵀ · x_hat. One program owns BLOCK_R rows and BLOCK_K columns of da and one slice of M.

It reads its part of x once and draws the mask again. Layers that share x each have a da, a dh and a
mask. Slices of M have a da each; sum_parts adds them in a fixed order.
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
    slices,
)
from lora_kernels.kernels.sum_parts import sum_parts
from lora_kernels.kernels.tiles import load_tile

CONFIGS = {
    "interpreter": dict.fromkeys(("narrow", "wide"), Skinny(64, 64, num_warps=4, num_stages=1)),
    "sm_80": {
        "narrow": Skinny(64, 128, num_warps=8, num_stages=3),
        "wide": Skinny(32, 64, num_warps=4, num_stages=2),
    },
    "sm_90": {
        "narrow": Skinny(64, 128, num_warps=8, num_stages=2),
        "wide": Skinny(32, 64, num_warps=4, num_stages=3),
    },
    "sm_100": {
        "narrow": Skinny(64, 128, num_warps=8, num_stages=2),
        "wide": Skinny(32, 64, num_warps=8, num_stages=3),
    },
    "hip": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=2),
        "wide": Skinny(32, 64, num_warps=4, num_stages=2),
    },
    "other": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=2),
        "wide": Skinny(32, 32, num_warps=4, num_stages=2),
    },
}


@triton.jit(do_not_specialize=["M", "threshold"])
def _da_kernel(
    dh_ptr, x_ptr, seed_ptr, da_ptr,
    M, K, R, layers, m_slice, threshold,
    stride_xm,
    DROPOUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same columns are neighbours: x comes from L2
    k = tl.program_id(0) // (ranks * layers) * BLOCK_K
    layer = tl.program_id(0) // ranks % layers
    r = tl.program_id(0) % ranks * BLOCK_R
    dh_ptr += tl.cast(layer, tl.int64) * M * R
    part = tl.program_id(1)
    first_m = tl.cast(part, tl.int64) * m_slice
    steps = tl.cdiv(tl.maximum(min(M - first_m, m_slice), 0), BLOCK_M).to(tl.int32)
    if DROPOUT:
        seed = tl.load(seed_ptr + layer)

    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for step in tl.range(0, steps):
        row = first_m + step * BLOCK_M
        # From the tile's own first row on: what each step has to compute is a scalar.
        dh = load_tile(dh_ptr + row * R, 0, r, R, M - row, R, BLOCK_M, BLOCK_R)
        x = load_tile(x_ptr + row * stride_xm, 0, k, stride_xm, M - row, K, BLOCK_M, BLOCK_K)
        if DROPOUT:
            x = tl.where(keep_tile(seed, row, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = tl.dot(dh.to(DTYPE).T, x.to(DTYPE), acc, input_precision=PRECISION)

    offs_r = r + tl.arange(0, BLOCK_R)
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_da = ((part * layers + layer) * R + offs_r).to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(da_ptr + offs_da, acc, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def da(
    dh: Tensor,
    x: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    numerics: Numerics,
    config: Skinny | None = None,
) -> Tensor:
    """da = dhᵀ·(x where kept); dh carries the mask's scale. Shapes: [M, R], [M, K] -> [R, K].

    For L layers that share x: dh [L, M, R], seed [L] -> [L, R, K].
    """
    (m, k), r, layers = x.shape, dh.shape[-1], dh.shape[:-2].numel()
    config = config or choose_skinny(CONFIGS, x.device, numerics.rank)
    block_r = rank_block(r, numerics.rank)
    cols, ranks = cdiv(k, config.BLOCK_COLS), cdiv(r, block_r)
    programs = cols * layers * ranks
    parts, m_slice = slices(m, config.BLOCK_ROWS, programs, config.waves, x.device)
    out = torch.empty((parts, *dh.shape[:-2], r, k), dtype=torch.float32, device=x.device)
    launch(
        _da_kernel, (programs, parts),
        dh, x, seed, out,
        m, k, r, layers, m_slice, word_threshold(dropout_p),
        x.stride(0),
        DROPOUT=dropout_p > 0, DTYPE=numerics.rank, PRECISION=numerics.precision,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_K=config.BLOCK_COLS, BLOCK_R=block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_parts(out, dtype)
