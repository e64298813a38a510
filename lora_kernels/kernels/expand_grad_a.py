"""dx = mask ∘ (dh · a) and da = dhᵀ · x_hat in one pass over [M, K], with one mask.

One program owns BLOCK_K columns of x and one slice of M, for all ranks. It writes its part of dx,
to which cuBLAS then adds dy·w, and a part of da. split_k_reduce adds the parts of da in a fixed
order. A program reads its columns of a once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix, rank_block, split
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.scaled import dot_scaled
from lora_kernels.kernels.split_k_reduce import split_k_reduce
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_of_terms,
    load_terms,
    split_terms,
    sum_terms,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import load_tile, part_of, store_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=3)),
        (When(), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=3)),
        (When(terms=True, r=16), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(32, 128, num_warps=8, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=3)),
        (When(terms=True, r=32), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(32, 128, num_warps=8, num_stages=3)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
    hip_wave32=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(scaled=True), SkinnyConfig(16, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(32, 128, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _expand_grad_a_kernel(
    dh, a, x, mask, dx, da_ptr,
    M, K, R, m_slice,
    NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K
    part = tl.program_id(1)
    first_m = tl.cast(part, tl.int64) * m_slice
    steps = tl.cdiv(tl.maximum(min(M - first_m, m_slice), 0), BLOCK_M).to(tl.int32)
    a_tile = load_tile(a, 0, k, R, K, BLOCK_R, BLOCK_K).to(NUMERICS.update)
    if mask is not None:
        seed = tl.load(mask.seed)

    DTYPE: tl.constexpr = NUMERICS.main
    IN_DOT: tl.constexpr = tl.float32 != DTYPE
    accs = zeros_of_terms(TERMS, APART, BLOCK_R, BLOCK_K, BELOW=True)
    for step in tl.range(0, steps):
        row = first_m + step * BLOCK_M
        dh_part = part_of(dh, row, 0)
        dh_tiles = load_terms(
            dh_part, 0, 0, M - row, R, M,
            False, TERMS, APART, DTYPE, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        # The first term is dh rounded, as it meets a.
        dh_tile = load_tile(dh_part, 0, 0, M - row, R, BLOCK_M, BLOCK_R)
        x_tile = load_tile(part_of(x, row, 0), 0, k, M - row, K, BLOCK_M, BLOCK_K)
        if tl.float16 == NUMERICS.update:
            update = dot_scaled(dh_tile, a_tile)
        else:
            left = dh_tile.to(NUMERICS.update)
            update = tl.dot(left, a_tile, input_precision=NUMERICS.update_precision)
        if mask is not None:
            keep = keep_tile(seed, mask.threshold, row, k, BLOCK_M, BLOCK_K, IN_DOT=IN_DOT)
            update, x_tile = tl.where(keep, update, 0.0), tl.where(keep, x_tile, 0.0)
        store_tile(part_of(dx, row, 0), update, 0, k, M - row, K)
        accs = dot_of_terms(accs, dh_tiles, x_tile, NUMERICS)

    offs_r = tl.arange(0, BLOCK_R)
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_da = (part * R + offs_r).to(tl.int64)[:, None] * K + offs_k[None, :]
    da = sum_terms(accs, BLOCK_R, BELOW=True)
    tl.store(da_ptr + offs_da, da, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def supports(r: int, numerics: Numerics, device: torch.device) -> bool:
    """Whether one program can take all ranks at once, which dx needs."""
    return r <= _block_r(r, numerics, device)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def expand_grad_a(
    dh: Tensor,
    a: Tensor,
    x: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = mask ∘ (dh·a) and da = dhᵀ·(mask ∘ x); dh includes the mask's scale.

    Shapes: dh [M, R], a [R, K], x [M, K] -> dx [M, K] in x's dtype, da [R, K] in a's.
    """
    (m, k), r = x.shape, len(a)
    config = config or config_for(x.device, r, numerics)
    dh, terms = split_terms(dh, x.dtype, numerics.rank_terms)
    block_r, programs = _block_r(r, numerics, x.device), cdiv(k, config.BLOCK_COLS)
    wanted = config.programs_per_sm * num_sms(x.device)
    parts, m_slice = split(m, config.BLOCK_ROWS, programs, wanted)
    dx = torch.empty((m, k), dtype=x.dtype, device=x.device)
    da = torch.empty((parts, r, k), dtype=torch.float32, device=x.device)
    launch(
        _expand_grad_a_kernel,
        (programs, parts),
        dh=matrix(dh),
        a=matrix(a),
        x=matrix(x),
        mask=mask(seed, dropout_p),
        dx=matrix(dx),
        da_ptr=da,
        M=m,
        K=k,
        R=r,
        m_slice=m_slice,
        NUMERICS=numerics,
        TERMS=terms,
        APART=are_apart(x.device, block_r),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx, split_k_reduce(da, a.dtype)


def _block_r(r: int, numerics: Numerics, device: torch.device) -> int:
    block = min(rank_block(r, numerics.update), rank_block(r, numerics.main))
    # Products with operands in registers have none for the terms of more ranks beside dx.
    return min(block, 32) if numerics.terms > 1 and are_apart(device) else block
