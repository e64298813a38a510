"""y = x · wᵀ + bias + scaling · h · bᵀ and h = x_hat · aᵀ in one launch, for up to 64 rows.

One program owns all rows of x and BLOCK_N columns of one group of y. With so few rows the layer is
bound by reading w, and launches show. So each program makes the h that it needs, from the tiles of
x that it multiplies with w; the first one of a group writes it. Every program reads a, and draws
the mask, again: a is R rows beside the N of w, and while w is on its way there is time for a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.dropout import keep_tile, word_threshold
from lora_kernels.kernels.launch import (
    Gemm,
    Numerics,
    cdiv,
    launch,
    rank_block,
    target_of,
)
from lora_kernels.kernels.tiles import add_bias, load_tile, locate, store_tile
from lora_kernels.plan import one_launch_rows

CONFIGS = {
    "interpreter": dict.fromkeys(
        ("float32", "up_to_16", "up_to_64"), Gemm(64, 64, 64, num_warps=4, num_stages=1)
    ),
    "sm_80": {
        "float32": Gemm(64, 32, 32, num_warps=4, num_stages=3),
        "up_to_16": Gemm(16, 32, 64, num_warps=4, num_stages=5),
        "up_to_64": Gemm(64, 32, 64, num_warps=8, num_stages=4),
    },
    "sm_90": {
        "float32": Gemm(64, 32, 32, num_warps=4, num_stages=3),
        "up_to_16": Gemm(16, 32, 128, num_warps=4, num_stages=4),
        "up_to_64": Gemm(64, 32, 64, num_warps=4, num_stages=4),
    },
    "sm_100": {
        "float32": Gemm(64, 32, 32, num_warps=8, num_stages=3),
        "up_to_16": Gemm(16, 32, 128, num_warps=4, num_stages=4),
        "up_to_64": Gemm(64, 32, 64, num_warps=4, num_stages=4),
    },
    "hip": {
        "float32": Gemm(64, 32, 32, num_warps=4, num_stages=2),
        "up_to_16": Gemm(16, 32, 128, num_warps=4, num_stages=2),
        "up_to_64": Gemm(64, 32, 64, num_warps=4, num_stages=2),
    },
    "other": {
        "float32": Gemm(64, 32, 32, num_warps=4, num_stages=2),
        "up_to_16": Gemm(16, 32, 64, num_warps=4, num_stages=3),
        "up_to_64": Gemm(64, 32, 64, num_warps=4, num_stages=2),
    },
}


@triton.jit(do_not_specialize=["M", "threshold"])
def _few_rows_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, seed_ptr, h_ptr, y_ptr,
    M, N, K, R, rank_total, sizes, scaling, threshold, keep_scale,
    stride_xm, stride_w, stride_ar, stride_bn, stride_ym,
    ENABLED: tl.constexpr, W_T: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    MAIN_DTYPE: tl.constexpr, FACTOR_DTYPE: tl.constexpr, UPDATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, UPDATE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column, end, b_row, group, enabled = locate(tl.program_id(0), sizes, ENABLED, BLOCK_N)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # A disabled group's h is that of another group, or of no row of a, and goes nowhere.
    a_row = group * R
    a_end = min(a_row + R, rank_total)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        x = load_tile(x_ptr, 0, k, stride_xm, M, K, BLOCK_M, BLOCK_K)
        a = load_tile(a_ptr, a_row, k, stride_ar, a_end, K, BLOCK_R, BLOCK_K)
        if W_T:
            w = load_tile(w_ptr, column, k, stride_w, N, K, BLOCK_N, BLOCK_K).T
        else:
            w = load_tile(w_ptr, k, column, stride_w, K, N, BLOCK_K, BLOCK_N)
        acc = tl.dot(x.to(MAIN_DTYPE), w.to(MAIN_DTYPE), acc, input_precision=UPDATE_PRECISION)
        if DROPOUT:
            x = tl.where(keep_tile(seed, 0, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        h = tl.dot(x.to(FACTOR_DTYPE), a.to(FACTOR_DTYPE).T, h, input_precision=PRECISION)
    h *= keep_scale

    if enabled:
        offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        start = 0
        for g in tl.static_range(len(ENABLED)):
            if column == start:  # the first tile of a group
                offs_h = offs_m[:, None] * rank_total + (a_row + offs_r)[None, :]
                tl.store(h_ptr + offs_h, h, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
            start += sizes[g]
        b = load_tile(b_ptr, b_row, 0, stride_bn, b_row + end - column, R, BLOCK_N, BLOCK_R).T
        update = (h * scaling).to(UPDATE_DTYPE)
        acc = tl.dot(update, b.to(UPDATE_DTYPE), acc, input_precision=UPDATE_PRECISION)
    if HAS_BIAS:
        acc = add_bias(acc, bias_ptr, column, end)
    store_tile(y_ptr, acc, 0, column, stride_ym, M, end)


def takes(m: int, r: int, dropout_p: float, numerics: Numerics) -> bool:
    """Whether few_rows is the launch for m rows and rank r."""
    return m <= one_launch_rows(dropout_p > 0) and r <= rank_block(r, numerics.factor)


def choose(configs: dict[str, dict[str, Gemm]], m: int, x: Tensor, numerics: Numerics) -> Gemm:
    """The entry of a table for m rows of x.

    Float32 factors over a 16-bit layer leave no registers for the tiles of "up_to_16", which are
    long in K.
    """
    table = configs[target_of(x.device)]
    if x.dtype == torch.float32:
        return table["float32"]
    narrow = numerics.factor is not tl.float32
    return table["up_to_16" if m <= 16 and narrow else "up_to_64"]


def few_rows(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    numerics: Numerics,
    config: Gemm | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ in the columns of each enabled group g; h = dropout(x)·aᵀ.

    Shapes: x [M, K] with M up to BLOCK_M, w [N, K] with one unit stride, a [E*r, K],
    b [sum of enabled splits, r], seed [1] -> y [M, N], h [M, E*r] float32; x, a and b have a unit
    inner stride.
    """
    (m, k), n, (ranks, r) = x.shape, w.shape[0], (a.shape[0], b.shape[1])
    config = config or choose(CONFIGS, m, x, numerics)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    h = torch.empty((m, ranks), dtype=torch.float32, device=x.device)
    w_t = w.stride(1) == 1  # stored [N, K], so transposed for x·wᵀ
    launch(
        _few_rows_kernel, (sum(cdiv(size, config.BLOCK_N) for size in out_splits),),
        x, w, a, b, bias, seed, h, y,
        m, n, k, r, ranks, out_splits, scaling,
        word_threshold(dropout_p), dropout.keep_scale(dropout_p),
        x.stride(0), w.stride(0) if w_t else w.stride(1), a.stride(0), b.stride(0), n,
        ENABLED=enable_lora, W_T=w_t, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0,
        MAIN_DTYPE=numerics.main, FACTOR_DTYPE=numerics.factor, UPDATE_DTYPE=numerics.update,
        PRECISION=numerics.precision, UPDATE_PRECISION=numerics.update_precision,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_block(r, numerics.factor),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, h
