"""y = x · wᵀ + bias + scaling · h · bᵀ and h = x_hat · aᵀ in one launch, for up to 64 rows.

One program owns all rows of x and BLOCK_N columns of one group of y. With so few rows the layer is
bound by reading w, and the time of a launch counts. So each program computes the h that it needs,
from the tiles of x that it multiplies with w. The first program of a group writes its h. Every
program reads a and draws the mask again: a has R rows beside the N of w, and there is time for the
mask while w is being read. It splits a float32 a into terms, too, which saves a launch. With a
magnitude the columns of y are multiplied by col_scale, before bias is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.dispatch.algorithm import is_small_m
from lora_kernels.kernels.config import GemmConfig, Tiles, When
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.split_terms import dot_terms, split_tile, sum_terms, zeros_of_terms
from lora_kernels.kernels.tile import add_bias, load_tile, locate, scale_columns, store_tile
from lora_kernels.spec import LoraSpec

TILES = Tiles(
    interpreter=[(When(), GemmConfig(64, 64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=4, num_stages=3)),
        (When(m=16), GemmConfig(16, 32, 64, num_warps=4, num_stages=5)),
        (When(terms=True), GemmConfig(64, 32, 64, num_warps=4, num_stages=3)),
        (When(), GemmConfig(64, 32, 64, num_warps=8, num_stages=4)),
    ],
    sm_90=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=4, num_stages=3)),
        (When(scaled=True, m=16), GemmConfig(16, 32, 64, num_warps=4, num_stages=4)),
        (When(m=16), GemmConfig(16, 32, 128, num_warps=4, num_stages=4)),
        (When(), GemmConfig(64, 32, 64, num_warps=4, num_stages=4)),
    ],
    sm_100=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=8, num_stages=3)),
        (When(scaled=True, m=16), GemmConfig(16, 32, 64, num_warps=4, num_stages=4)),
        (When(m=16), GemmConfig(16, 32, 128, num_warps=4, num_stages=4)),
        (When(), GemmConfig(64, 32, 64, num_warps=4, num_stages=4)),
    ],
    hip=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=4, num_stages=2)),
        (When(m=16), GemmConfig(16, 32, 128, num_warps=4, num_stages=2)),
        (When(), GemmConfig(64, 32, 64, num_warps=4, num_stages=2)),
    ],
    other=[
        (When(bits=32), GemmConfig(64, 32, 32, num_warps=4, num_stages=2)),
        (When(m=16), GemmConfig(16, 32, 64, num_warps=4, num_stages=3)),
        (When(), GemmConfig(64, 32, 64, num_warps=4, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _gemm_small_m_kernel(
    x, w, a, b, bias, col_scale, mask, h_ptr, y,
    M, N, K, R, rank_total, sizes, scaling, keep_scale,
    ENABLED: tl.constexpr, W_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    column, end, b_row, group, enabled = locate(tl.program_id(0), sizes, ENABLED, BLOCK_N)
    if mask is not None:
        seed = tl.load(mask.seed)
    # For a disabled group, h is that of another group or of no row of a; it is not used.
    a_row = group * R
    a_end = min(a_row + R, rank_total)

    # dot_terms scales terms of float16 itself.
    IN_TERMS: tl.constexpr = NUMERICS.terms == 1 or tl.float16 != NUMERICS.main
    TERMS: tl.constexpr = NUMERICS.terms if IN_TERMS and NUMERICS.terms > 1 else 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hs = zeros_of_terms(TERMS, True, BLOCK_M, BLOCK_R)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        x_tile = load_tile(x, 0, k, M, K, BLOCK_M, BLOCK_K)
        a_tile = load_tile(a, a_row, k, a_end, K, BLOCK_R, BLOCK_K)
        if W_T:
            w_tile = load_tile(w, column, k, N, K, BLOCK_N, BLOCK_K).T
        else:
            w_tile = load_tile(w, k, column, K, N, BLOCK_K, BLOCK_N)
        left, right = x_tile.to(NUMERICS.main), w_tile.to(NUMERICS.main)
        acc = tl.dot(left, right, acc, input_precision=NUMERICS.update_precision)
        if mask is not None:
            keep = keep_tile(seed, mask.threshold, 0, k, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        a_tiles = split_tile(a_tile, TERMS, NUMERICS.main) if IN_TERMS else (a_tile,)
        hs = dot_terms(hs, x_tile, a_tiles, True, NUMERICS)
    h = sum_terms(hs, BLOCK_R) * keep_scale

    if enabled:
        offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        start = 0
        for g in tl.static_range(len(ENABLED)):
            if column == start:  # the first tile of a group
                offs_h = offs_m[:, None] * rank_total + (a_row + offs_r)[None, :]
                tl.store(h_ptr + offs_h, h, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
            start += sizes[g]
        b_tile = load_tile(b, b_row, 0, b_row + end - column, R, BLOCK_N, BLOCK_R).T
        # Not in float16, which would not hold h: TF32 has as many bits.
        IN: tl.constexpr = tl.float32 if tl.float16 == NUMERICS.update else NUMERICS.update
        left, right = (h * scaling).to(IN), b_tile.to(IN)
        acc = tl.dot(left, right, acc, input_precision=NUMERICS.update_precision)
    acc = scale_columns(acc, col_scale, column, end)
    acc = add_bias(acc, bias, column, end)
    store_tile(y, acc, 0, column, M, end)


def supports(m: int, r: int, dropout_p: float, numerics: Numerics) -> bool:
    """Whether gemm_small_m takes m rows and rank r."""
    return is_small_m(m, dropout_p > 0) and r <= _block_r(r, numerics)


def _block_r(r: int, numerics: Numerics) -> int:
    # The terms of a take registers, as float32 tiles do.
    return rank_block(r, tl.float32 if numerics.terms > 1 else numerics.main)


def config_for(x: Tensor, numerics: Numerics) -> GemmConfig:
    """The entry of TILES that serves x [M, K]."""
    return select_for(TILES, x.device, numerics, x.shape[0])


def gemm_small_m(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    spec: LoraSpec,
    numerics: Numerics,
    config: GemmConfig | None = None,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scaling·h_g·b_gᵀ in the columns of each enabled group g; h = dropout(x)·aᵀ.

    col_scale multiplies the columns of y before bias is added.
    Shapes: x [M, K] with M up to BLOCK_M, w [N, K] with one unit stride, a [E·r, K],
    b [rows of the enabled groups, r], seed [1], col_scale [N] float32 -> y [M, N], h [M, E·r]
    float32; x, a and b have a unit inner stride.
    """
    (m, k), n, (ranks, r), splits = x.shape, w.shape[0], (a.shape[0], b.shape[1]), spec.splits
    config = config or config_for(x, numerics)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    h = torch.empty((m, ranks), dtype=torch.float32, device=x.device)
    w_t = w.stride(1) == 1  # stored [N, K], so transposed for x·wᵀ
    launch(
        _gemm_small_m_kernel,
        (sum(cdiv(size, config.BLOCK_N) for size in splits.sizes),),
        x=matrix(x),
        w=matrix(w if w_t else w.T),
        a=matrix(a),
        b=matrix(b),
        bias=bias,
        col_scale=col_scale,
        mask=mask(seed, spec.dropout_p),
        h_ptr=h,
        y=matrix(y),
        M=m,
        N=n,
        K=k,
        R=r,
        rank_total=ranks,
        sizes=splits.sizes,
        scaling=spec.scaling,
        keep_scale=dropout.keep_scale(spec.dropout_p),
        ENABLED=splits.enabled,
        W_T=w_t,
        NUMERICS=numerics,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=_block_r(r, numerics),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, h
