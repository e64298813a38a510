"""dh = scale_dh · dy · b and db = scale_db · dyᵀ · h from one read of dy.

One program owns BLOCK_M rows of dy and one slice of the columns of one enabled group, for BLOCK_R
ranks. Its slice gives a part of these rows of dh, its rows a part of these columns of db; sum_parts
adds both in a fixed order. Disabled groups are not read.

Parts of db, written and read, are 4·r / BLOCK_M of the bytes of a 16-bit dy. Where that is more
than reading dy again, db comes from da's kernel instead: dbᵀ = scale_db · hᵀ · dy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import reference
from lora_kernels.kernels.da import da
from lora_kernels.kernels.launch import (
    Numerics,
    Skinny,
    cdiv,
    choose_skinny,
    launch,
    rank_block,
    slices,
)
from lora_kernels.kernels.sum_parts import sum_both, sum_parts
from lora_kernels.kernels.tiles import load_tile

CONFIGS = {
    "interpreter": dict.fromkeys(("narrow", "wide"), Skinny(64, 64, num_warps=4, num_stages=1)),
    "sm_80": {
        "narrow": Skinny(128, 64, num_warps=4, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=3),
    },
    "sm_90": {
        "narrow": Skinny(256, 64, num_warps=8, num_stages=3, waves=1),
        "narrow_high_rank": Skinny(128, 64, num_warps=4, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=2),
    },
    "sm_100": {
        "narrow": Skinny(128, 64, num_warps=4, num_stages=3),
        "wide": Skinny(64, 32, num_warps=8, num_stages=2),
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


@triton.jit(do_not_specialize=["M", "parts"])
def _dy_pass_kernel(
    dy_ptr, b_ptr, h_ptr, dh_ptr, db_ptr,
    M, R, rank_total, b_rows, sizes, parts, scale_dh, scale_db,
    stride_dym, stride_bn,
    ENABLED: tl.constexpr, NEEDS_DH: tl.constexpr, NEEDS_DB: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr, RANK_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ranks = tl.cdiv(R, BLOCK_R)  # programs of the same rows are neighbours: dy comes from L2
    pid_m = (tl.program_id(0) // ranks).to(tl.int64)
    r = tl.program_id(0) % ranks * BLOCK_R
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    row = pid_m * BLOCK_M

    # The group-th enabled group: its first column of dy, its first row of b, its size.
    start, b_start, size = 0, 0, 0
    column, b_row, seen = 0, 0, 0
    for g in tl.static_range(len(ENABLED)):
        if ENABLED[g]:
            here = group == seen
            start = tl.where(here, column, start)
            b_start = tl.where(here, b_row, b_start)
            size = tl.where(here, sizes[g], size)
            b_row += sizes[g]
            seen += 1
        column += sizes[g]
    n_slice = tl.cdiv(tl.cdiv(size, BLOCK_N), parts) * BLOCK_N
    first_n = part * n_slice
    steps = tl.cdiv(tl.maximum(min(size - first_n, n_slice), 0), BLOCK_N)

    offs_r = r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    if NEEDS_DB:
        h = load_tile(h_ptr + group * R, row, r, rank_total, M, R, BLOCK_M, BLOCK_R)
        h = h.to(RANK_DTYPE)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in tl.range(0, steps):
        n = first_n + step * BLOCK_N
        dy = load_tile(dy_ptr, row, start + n, stride_dym, M, start + size, BLOCK_M, BLOCK_N)
        if NEEDS_DH:
            b = load_tile(b_ptr, b_start + n, r, stride_bn, b_start + size, R, BLOCK_N, BLOCK_R)
            acc = tl.dot(dy.to(FACTOR_DTYPE), b.to(FACTOR_DTYPE), acc, input_precision=PRECISION)
        if NEEDS_DB:
            db = tl.dot(dy.to(RANK_DTYPE).T, h, input_precision=PRECISION) * scale_db
            offs_n = n + tl.arange(0, BLOCK_N)
            offs_b = (pid_m * b_rows + b_start + offs_n)[:, None] * R + offs_r[None, :]
            tl.store(db_ptr + offs_b, db, mask=(offs_n < size)[:, None] & mask_r[None, :])

    if NEEDS_DH:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_dh = (tl.cast(part, tl.int64) * M + offs_m)[:, None] * rank_total + group * R
        mask = (offs_m < M)[:, None] & mask_r[None, :]
        tl.store(dh_ptr + offs_dh + offs_r[None, :], acc * scale_dh, mask=mask)


def dy_pass(
    dy: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale_dh: float,
    scale_db: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    needs_dh: bool,
    needs_db: bool,
    numerics: Numerics,
    config: Skinny | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dh_g = scale_dh·dy_g·b_g and db_g = scale_db·dy_gᵀ·h_g for each enabled group g.

    Shapes: dy [M, N], b [sum of enabled splits, r], h [M, E*r] -> dh [M, E*r] in
    numerics.dh, db like b; None for what is not needed.
    """
    m, (b_rows, r) = dy.shape[0], b.shape
    config = config or choose_skinny(CONFIGS, dy.device, numerics.rank, r)
    groups, largest = sum(enable_lora), max(out_splits)
    db = None
    if needs_db and 4 * r > config.BLOCK_ROWS:
        db = _db_alone(dy, h, scale_db, out_splits, enable_lora, r, b.dtype, numerics)
        needs_db = False
    if not (needs_dh or needs_db):
        return None, db
    block_r = rank_block(r, numerics.rank)
    rows, ranks = cdiv(m, config.BLOCK_ROWS), cdiv(r, block_r)
    parts, _ = slices(
        largest, config.BLOCK_COLS, rows * ranks * groups, config.waves, dy.device
    )  # fmt: skip
    dh = db_parts = None
    if needs_dh:
        dh = torch.empty((parts, m, groups * r), dtype=torch.float32, device=dy.device)
    if needs_db:
        db_parts = torch.empty((rows, b_rows, r), dtype=torch.float32, device=dy.device)
    launch(
        _dy_pass_kernel, (rows * ranks, groups * parts),
        dy, b, h, dh, db_parts,
        m, r, groups * r, b_rows, out_splits, parts, scale_dh, scale_db,
        dy.stride(0), b.stride(0),
        ENABLED=enable_lora, NEEDS_DH=needs_dh, NEEDS_DB=needs_db,
        FACTOR_DTYPE=numerics.factor, RANK_DTYPE=numerics.rank, PRECISION=numerics.precision,
        BLOCK_M=config.BLOCK_ROWS, BLOCK_N=config.BLOCK_COLS, BLOCK_R=block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if needs_dh and needs_db:
        return sum_both(dh, numerics.dh, db_parts, b.dtype)
    if needs_dh:
        return sum_parts(dh, numerics.dh), db
    return None, sum_parts(db_parts, b.dtype)


def _db_alone(
    dy: Tensor,
    h: Tensor,
    scale: float,
    out_splits: tuple[int, ...],
    enable_lora: tuple[bool, ...],
    r: int,
    dtype: torch.dtype,
    numerics: Numerics,
) -> Tensor:
    """db by da's kernel, a group at a time. Shapes as in dy_pass."""
    parts = [
        da(h[:, ranks].contiguous(), dy[:, columns], None, 0.0, torch.float32, numerics)
        for columns, _, ranks in reference.groups(out_splits, enable_lora, r)
    ]
    return (torch.cat(parts, 1).T * scale).to(dtype).contiguous()
