"""da = dhᵀ · x_hat. One program owns BLOCK_R rows and BLOCK_K columns of da and one slice of M.

It reads its part of x once and draws the mask again. Layers that share x each have a da, a dh and a
mask. Each slice of M has a da of its own; split_k_reduce adds these in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix, rank_block, split
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.split_k_reduce import split_k_reduce
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_of_terms,
    load_terms,
    split_terms,
    sum_terms,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import load_tile, part_of

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=3)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(scaled=True), SkinnyConfig(64, 128, num_warps=8, num_stages=3)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
    hip_wave32=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _grad_a_kernel(
    dh, x, mask, da_ptr,
    M, K, R, layers, m_slice,
    NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same columns are neighbours: x comes from L2
    k = tl.program_id(0) // (ranks * layers) * BLOCK_K
    layer = tl.program_id(0) // ranks % layers
    r = tl.program_id(0) % ranks * BLOCK_R
    dh = part_of(dh, tl.cast(layer, tl.int64) * M, 0)
    part = tl.program_id(1)
    first_m = tl.cast(part, tl.int64) * m_slice
    steps = tl.cdiv(tl.maximum(min(M - first_m, m_slice), 0), BLOCK_M).to(tl.int32)
    if mask is not None:
        seed = tl.load(mask.seed + layer)

    DTYPE: tl.constexpr = NUMERICS.main
    IN_DOT: tl.constexpr = tl.float32 != DTYPE
    accs = zeros_of_terms(TERMS, APART, BLOCK_R, BLOCK_K, BELOW=True)
    for step in tl.range(0, steps):
        row = first_m + step * BLOCK_M
        # Pointers begin at the tile's first row, so that each step computes only a scalar.
        dh_tiles = load_terms(
            part_of(dh, row, 0), 0, r, M - row, R, layers * M,
            False, TERMS, APART, DTYPE, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        x_tile = load_tile(part_of(x, row, 0), 0, k, M - row, K, BLOCK_M, BLOCK_K)
        if mask is not None:
            keep = keep_tile(seed, mask.threshold, row, k, BLOCK_M, BLOCK_K, IN_DOT=IN_DOT)
            x_tile = tl.where(keep, x_tile, 0.0)
        accs = dot_of_terms(accs, dh_tiles, x_tile, NUMERICS)

    offs_r = r + tl.arange(0, BLOCK_R)
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_da = ((part * layers + layer) * R + offs_r).to(tl.int64)[:, None] * K + offs_k[None, :]
    da = sum_terms(accs, BLOCK_R, BELOW=True)
    tl.store(da_ptr + offs_da, da, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def grad_a(
    dh: Tensor,
    x: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """da = dhᵀ·(mask ∘ x) in dtype; dh includes the mask's scale. dh [M, R], x [M, K] -> [R, K].

    For L layers that share x: dh [L, M, R], seed [L] -> [L, R, K].
    """
    (m, k), (*stack, _, r), layers = x.shape, dh.shape, dh.shape[:-2].numel()
    config = config or config_for(x.device, r, numerics)
    dh, terms = split_terms(dh, x.dtype, numerics.rank_terms)
    block_r = rank_block(r, numerics.main)
    programs = cdiv(k, config.BLOCK_COLS) * layers * cdiv(r, block_r)
    wanted = config.programs_per_sm * num_sms(x.device)
    parts, m_slice = split(m, config.BLOCK_ROWS, programs, wanted)
    da = torch.empty((parts, *stack, r, k), dtype=torch.float32, device=x.device)
    launch(
        _grad_a_kernel,
        (programs, parts),
        dh=matrix(dh),
        x=matrix(x),
        mask=mask(seed, dropout_p),
        da_ptr=da,
        M=m,
        K=k,
        R=r,
        layers=layers,
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
    return split_k_reduce(da, dtype)
