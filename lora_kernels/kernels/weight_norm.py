"""norm = the norms of the rows of w + scaling·b·a. One program owns BLOCK_N rows of w.

It reads them once, with all of a and its rows of b, and adds up the squares of the sums. So nothing
of w's size is written, and no digits are lost if w and the update nearly cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.scaled import scaled
from lora_kernels.kernels.split_terms import load_terms, split_terms, terms_of
from lora_kernels.kernels.tile import load_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(16, 128, num_warps=4, num_stages=3)),
        (When(scaled=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(scaled=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(r=16), SkinnyConfig(16, 256, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(16, 128, num_warps=4, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(16, 128, num_warps=4, num_stages=3)),
        (When(scaled=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(scaled=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(r=16), SkinnyConfig(16, 256, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(16, 128, num_warps=4, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(16, 64, num_warps=4, num_stages=3)),
        (When(scaled=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(scaled=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(r=16), SkinnyConfig(16, 256, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=3)),
        (When(), SkinnyConfig(16, 128, num_warps=4, num_stages=3)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(16, 128, num_warps=4, num_stages=2)),
        (When(r=16), SkinnyConfig(16, 256, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(16, 128, num_warps=4, num_stages=2)),
    ],
    hip_wave32=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 16, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(16, 128, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(16, 128, num_warps=4, num_stages=2)),
        (When(r=16), SkinnyConfig(16, 256, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(16, 128, num_warps=4, num_stages=2)),
    ],
)


@triton.jit
def _load_w(
    w, row, k, N, K, W_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """w[row.., k..] -> [BLOCK_N, BLOCK_K]. W_T: w is stored [K, N]."""
    if W_T:
        tile = load_tile(w, k, row, K, N, BLOCK_K, BLOCK_N).T
    else:
        tile = load_tile(w, row, k, N, K, BLOCK_N, BLOCK_K)
    return tile


@triton.jit
def _weight_norm_kernel(
    w, a, b, norm_ptr,
    N, K, R, scaling,
    W_T: tl.constexpr, NUMERICS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    IN_TERMS: tl.constexpr = NUMERICS.terms > 1
    SCALED: tl.constexpr = IN_TERMS and tl.float16 == NUMERICS.main
    DTYPE: tl.constexpr = NUMERICS.main
    row = tl.program_id(0) * BLOCK_N
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w_tile = _load_w(w, row, 0, N, K, W_T, BLOCK_N, BLOCK_K)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        # No dot takes w, so the compiler does not load the next tile ahead.
        next_tile = _load_w(w, row, k + BLOCK_K, N, K, W_T, BLOCK_N, BLOCK_K)
        update = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for block in tl.range(RANK_BLOCKS, num_stages=1):
            r = block * BLOCK_R
            rights = load_terms(a, r, k, R, K, R, True, TERMS, True, DTYPE, BLOCK_R, BLOCK_K)
            b_tile = load_tile(b, row, r, N, R, BLOCK_N, BLOCK_R)
            product = update
            if SCALED:
                lefts, down = scaled(b_tile, 1, NUMERICS.terms)
                rights, down_right = scaled(rights[0], 0, NUMERICS.terms)
                product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            elif IN_TERMS:
                lefts = terms_of(b, row, r, N, R, NUMERICS.terms, True, NUMERICS, BLOCK_N, BLOCK_R)
            else:
                lefts = (b_tile.to(DTYPE),)
            # Products of small terms come first; what is smaller than the last bit, not at all.
            for order in tl.static_range(len(lefts) - 1, -1, -1):
                for i in tl.static_range(order + 1):
                    if order - i < len(rights):
                        right = rights[order - i].to(DTYPE)
                        product = tl.dot(
                            lefts[i], right, product, input_precision=NUMERICS.precision
                        )
            update = update + product * down * down_right if SCALED else product
        total = w_tile.to(tl.float32) + scaling * update
        squares += total * total
        w_tile = next_tile
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(norm_ptr + rows, tl.sqrt(tl.sum(squares, 1)), mask=rows < N)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def weight_norm(
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """The norms of the rows of w + scaling·b·a in float32. numerics: those of w, a and b.

    Shapes: w [N, K] with one unit stride, a [R, K], b [N, R] -> [N]; a and b have a unit inner
    stride.
    """
    (n, k), r = w.shape, len(a)
    config = config or config_for(w.device, r, numerics)
    w_t = w.stride(1) != 1  # stored [K, N]
    a, terms = split_terms(a, w.dtype, numerics.rank_terms)
    block_r = rank_block(r, numerics.main, beside_acc=True)
    norm = torch.empty(n, dtype=torch.float32, device=w.device)
    launch(
        _weight_norm_kernel,
        (cdiv(n, config.BLOCK_ROWS),),
        w=matrix(w.T if w_t else w),
        a=matrix(a),
        b=matrix(b),
        norm_ptr=norm,
        N=n,
        K=k,
        R=r,
        scaling=scaling,
        W_T=w_t,
        NUMERICS=numerics,
        TERMS=terms,
        BLOCK_N=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return norm
