"""h = x_hat · aᵀ. One program owns BLOCK_M rows of h, BLOCK_R of its columns and one slice of K.

It reads its part of x once and drops elements in registers. Layers that share x each have an h, an
a and a mask. If M alone gives too few programs, K is cut into slices, each with an h of its own,
and split_k_reduce adds these in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms
from lora_kernels.kernels.dropout import keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix, rank_block, split
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.split_k_reduce import split_k_reduce
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_terms,
    load_terms,
    split_terms,
    sum_terms,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import load_tile, part_of

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=3)),
        (When(terms=True, r=16), SkinnyConfig(128, 32, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(scaled=True, r=16), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(scaled=True), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=3)),
        (When(terms=True, r=16), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(terms=True), SkinnyConfig(128, 32, num_warps=8, num_stages=3)),
        (When(), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=3)),
        (When(terms=True), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(scaled=True), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=3)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(scaled=True), SkinnyConfig(128, 32, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x, a, mask, h_ptr,
    M, K, R, layers, k_slice, scale,
    NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same rows are neighbours: x comes from L2
    row = (tl.program_id(0) // (ranks * layers)).to(tl.int64) * BLOCK_M
    layer = tl.program_id(0) // ranks % layers
    r = tl.program_id(0) % ranks * BLOCK_R
    a = part_of(a, tl.cast(layer, tl.int64) * R, 0)
    part = tl.program_id(1)
    first_k = part * k_slice
    steps = tl.cdiv(tl.maximum(min(K - first_k, k_slice), 0), BLOCK_K)
    if mask is not None:
        seed = tl.load(mask.seed + layer)

    accs = zeros_of_terms(TERMS, APART, BLOCK_M, BLOCK_R)
    for step in tl.range(0, steps):
        k = first_k + step * BLOCK_K
        x_tile = load_tile(x, row, k, M, K, BLOCK_M, BLOCK_K)
        a_tiles = load_terms(
            a, r, k, R, K, layers * R,
            True, TERMS, APART, NUMERICS.main, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        if mask is not None:
            keep = keep_tile(seed, mask.threshold, row, k, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        accs = dot_terms(accs, x_tile, a_tiles, True, NUMERICS)

    offs_m = row + tl.arange(0, BLOCK_M)
    offs_r = r + tl.arange(0, BLOCK_R)
    offs_h = (tl.cast(part * layers + layer, tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    h = sum_terms(accs, BLOCK_R) * scale
    tl.store(h_ptr + offs_h, h, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def shrink(
    x: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """h = dropout(x)·aᵀ in float32. Shapes: x [M, K], a [R, K], seed [1] -> [M, R].

    For L layers that share x: a [L, R, K], seed [L] -> [L, M, R].
    """
    (m, k), (*stack, r, _), layers = x.shape, a.shape, a.shape[:-2].numel()
    config = config or config_for(x.device, r, numerics)
    a, terms = split_terms(a, x.dtype, numerics.terms)
    block_r = rank_block(r, numerics.main)
    programs = cdiv(m, config.BLOCK_ROWS) * layers * cdiv(r, block_r)
    wanted = config.programs_per_sm * num_sms(x.device)
    parts, k_slice = split(k, config.BLOCK_COLS, programs, wanted)
    h = torch.empty((parts, *stack, m, r), dtype=torch.float32, device=x.device)
    launch(
        _shrink_kernel,
        (programs, parts),
        x=matrix(x),
        a=matrix(a),
        mask=mask(seed, dropout_p),
        h_ptr=h,
        M=m,
        K=k,
        R=r,
        layers=layers,
        k_slice=k_slice,
        scale=dropout.keep_scale(dropout_p),
        NUMERICS=numerics,
        TERMS=terms,
        APART=are_apart(x.device),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_K=config.BLOCK_COLS,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return split_k_reduce(h, torch.float32)
