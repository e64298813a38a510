"""h = x_hat · aᵀ. One program owns BLOCK_M rows of h, BLOCK_R of its columns and one slice of K.

It reads its part of x once and drops elements in registers. Layers that share x each have an h, an
a and a mask. Where M alone gives too few programs, K is cut into slices, each with an h of its own,
and sum_parts adds these in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
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
        "narrow": Skinny(128, 64, num_warps=8, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=3),
    },
    "sm_90": {
        "narrow": Skinny(128, 64, num_warps=8, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=3),
    },
    "sm_100": {
        "narrow": Skinny(64, 128, num_warps=8, num_stages=2),
        "narrow_high_rank": Skinny(64, 64, num_warps=4, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=3),
    },
    "hip": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=2),
        "wide": Skinny(64, 32, num_warps=4, num_stages=2),
    },
    "other": {
        "narrow": Skinny(64, 64, num_warps=4, num_stages=2),
        "wide": Skinny(32, 32, num_warps=4, num_stages=2),
    },
}


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_kernel(
    x_ptr, a_ptr, seed_ptr, h_ptr,
    M, K, R, layers, k_slice, threshold, scale,
    stride_xm, stride_ar,
    DROPOUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same rows are neighbours: x comes from L2
    row = (tl.program_id(0) // (ranks * layers)).to(tl.int64) * BLOCK_M
    layer = tl.program_id(0) // ranks % layers
    r = tl.program_id(0) % ranks * BLOCK_R
    a_ptr += tl.cast(layer, tl.int64) * R * stride_ar
    part = tl.program_id(1)
    first_k = part * k_slice
    steps = tl.cdiv(tl.maximum(min(K - first_k, k_slice), 0), BLOCK_K)
    if DROPOUT:
        seed = tl.load(seed_ptr + layer)

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in tl.range(0, steps):
        k = first_k + step * BLOCK_K
        x = load_tile(x_ptr, row, k, stride_xm, M, K, BLOCK_M, BLOCK_K)
        a = load_tile(a_ptr, r, k, stride_ar, R, K, BLOCK_R, BLOCK_K)
        if DROPOUT:
            x = tl.where(keep_tile(seed, row, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = tl.dot(x.to(DTYPE), a.to(DTYPE).T, acc, input_precision=PRECISION)

    offs_m = row + tl.arange(0, BLOCK_M)
    offs_r = r + tl.arange(0, BLOCK_R)
    offs_h = (tl.cast(part * layers + layer, tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(h_ptr + offs_h, acc * scale, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


def down(
    x: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    config: Skinny | None = None,
) -> Tensor:
    """h = dropout(x)·aᵀ in float32. Shapes: x [M, K], a [R, K], seed [1] -> [M, R].

    For L layers that share x: a [L, R, K], seed [L] -> [L, M, R].
    """
    (m, k), r, layers = x.shape, a.shape[-2], a.shape[:-2].numel()
    config = config or choose_skinny(CONFIGS, x.device, numerics.factor, r)
    block_r = rank_block(r, numerics.factor)
    rows, ranks = cdiv(m, config.BLOCK_ROWS), cdiv(r, block_r)
    programs = rows * layers * ranks
    parts, k_slice = slices(k, config.BLOCK_COLS, programs, config.waves, x.device)
    h = torch.empty((parts, *a.shape[:-2], m, r), dtype=torch.float32, device=x.device)
    launch(
        _down_kernel, (programs, parts),
        x, a, seed, h,
        m, k, r, layers, k_slice, word_threshold(dropout_p), dropout.keep_scale(dropout_p),
        x.stride(0), a.stride(-2),
        DROPOUT=dropout_p > 0, DTYPE=numerics.factor, PRECISION=numerics.precision,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_K=config.BLOCK_COLS, BLOCK_R=block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_parts(h, torch.float32)
