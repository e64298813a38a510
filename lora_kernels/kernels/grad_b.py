"""dh = scale_dh · dy · b and db = scale_db · dyᵀ · h from one read of dy.

One program owns BLOCK_M rows of dy and one slice of the columns of one enabled group, for BLOCK_R
ranks. It computes a part of dh, which its slice of columns contributes to these rows, and a part of
db, which its rows contribute to these columns. split_k_reduce adds the parts of both in a fixed
order. Disabled groups are not read.

The parts of db are written and read again: 4·r / BLOCK_M times the bytes of a 16-bit dy. If that is
more than reading dy again, db comes from grad_a's kernel instead: dbᵀ = scale_db · hᵀ · dy.

With a magnitude col_scale ∘ dy stands for dy. The rows of db are multiplied by it here. Those of b
are multiplied before, because a product of float32 tiles has no registers for that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout
from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms
from lora_kernels.kernels.grad_a import grad_a
from lora_kernels.kernels.launch import cdiv, launch, matrix, rank_block, split
from lora_kernels.kernels.numerics import Numerics, select_for
from lora_kernels.kernels.scaled import scaled
from lora_kernels.kernels.split_k_reduce import split_k_reduce, split_k_reduce_both
from lora_kernels.kernels.split_terms import (
    are_apart,
    dot_terms,
    load_terms,
    split_terms,
    sum_terms,
    terms_of,
    zeros_of_terms,
)
from lora_kernels.kernels.tile import Matrix, load_tile, part_of
from lora_kernels.spec import LoraSpec

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=3)),
        (When(terms=True, r=16), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
        (When(scaled=True, r=16), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
        (When(scaled=True), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(scaled=True, r=16), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
        (When(r=16), SkinnyConfig(256, 64, num_warps=8, num_stages=3, programs_per_sm=1)),
        (When(), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
        (When(terms=True, r=16), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
        (When(terms=True), SkinnyConfig(128, 64, num_warps=8, num_stages=3)),
        (When(), SkinnyConfig(128, 64, num_warps=4, num_stages=3)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(64, 32, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
    ],
    hip_wave32=[
        (When(bits=32), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(terms=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(scaled=True), SkinnyConfig(32, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(64, 32, num_warps=8, num_stages=2)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=2)),
        (When(terms=True), SkinnyConfig(64, 64, num_warps=8, num_stages=2)),
        (When(), SkinnyConfig(128, 64, num_warps=8, num_stages=2)),
    ],
)


@triton.jit(do_not_specialize=["M", "parts"])
def _grad_b_kernel(
    dy, b, h_ptr, col_scale, dh_ptr, db_ptr,
    M, R, rank_total, b_rows, sizes, parts, scale_dh, scale_db,
    ENABLED: tl.constexpr, NUMERICS: tl.constexpr, TERMS: tl.constexpr, APART: tl.constexpr,
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

    RANK_TERMS: tl.constexpr = NUMERICS.terms
    offs_r = r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    if db_ptr is not None:
        h = Matrix(h_ptr, rank_total)
        h = part_of(h, 0, group * R)
        if tl.float16 == NUMERICS.main:
            h_tile = load_tile(h, row, r, M, R, BLOCK_M, BLOCK_R)
            hs, down = scaled(h_tile, 0, RANK_TERMS)
        elif RANK_TERMS > 1:
            hs = terms_of(h, row, r, M, R, RANK_TERMS, APART, NUMERICS, BLOCK_M, BLOCK_R)
        else:
            hs = (load_tile(h, row, r, M, R, BLOCK_M, BLOCK_R).to(NUMERICS.main),)
    accs = zeros_of_terms(TERMS, APART, BLOCK_M, BLOCK_R)
    for step in tl.range(0, steps):
        n = first_n + step * BLOCK_N
        dy_tile = load_tile(dy, row, start + n, M, start + size, BLOCK_M, BLOCK_N)
        if dh_ptr is not None:
            b_tiles = load_terms(
                b, b_start + n, r, b_start + size, R, b_rows,
                False, TERMS, APART, NUMERICS.main, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            accs = dot_terms(accs, dy_tile, b_tiles, False, NUMERICS)
        if db_ptr is not None:
            left, dbs = dy_tile.to(NUMERICS.main).T, ()
            for i in tl.static_range(len(hs)):
                dbs += (tl.dot(left, hs[i], input_precision=NUMERICS.precision),)
            db = sum_terms(dbs, BLOCK_R) * scale_db
            if tl.float16 == NUMERICS.main:
                db = db * down
            offs_n = n + tl.arange(0, BLOCK_N)
            if col_scale is not None:
                db *= tl.load(col_scale + start + offs_n, mask=offs_n < size, other=0.0)[:, None]
            offs_b = (pid_m * b_rows + b_start + offs_n)[:, None] * R + offs_r[None, :]
            tl.store(db_ptr + offs_b, db, mask=(offs_n < size)[:, None] & mask_r[None, :])

    if dh_ptr is not None:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_dh = (tl.cast(part, tl.int64) * M + offs_m)[:, None] * rank_total + group * R
        mask = (offs_m < M)[:, None] & mask_r[None, :]
        dh = sum_terms(accs, BLOCK_R) * scale_dh
        tl.store(dh_ptr + offs_dh + offs_r[None, :], dh, mask=mask)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select_for(TILES, device, numerics, r=r)


def grad_b(
    dy: Tensor,
    b: Tensor,
    h: Tensor | None,
    spec: LoraSpec,
    needs_dh: bool,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
    col_scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dh_g = scaling·keep_scale·dy_g·b_g and db_g = scaling·dy_gᵀ·h_g for each enabled group g.

    With col_scale, for one group, col_scale∘dy stands for dy.
    Shapes: dy [M, N], b [rows of the enabled groups, r], h [M, E·r], col_scale [N] float32 ->
    dh [M, E·r] in numerics.dh, db like b. dh is None if needs_dh is False, db is None if h is None.
    """
    m, (b_rows, r), splits = dy.shape[0], b.shape, spec.splits
    groups = splits.count
    config = config or config_for(dy.device, r, numerics)
    if col_scale is not None:
        b = torch.mul(b, col_scale[:, None], out=torch.empty_like(b))
    db, needs_db = None, h is not None
    if needs_db and 4 * r > config.BLOCK_ROWS:
        db, needs_db = _db_alone(dy, h, spec, r, numerics), False
        db = (db if col_scale is None else db * col_scale[:, None]).to(b.dtype)
    if not (needs_dh or needs_db):
        return None, db
    dtype = b.dtype
    b, terms = split_terms(b, dy.dtype, numerics.terms)
    block_r = rank_block(r, numerics.main)
    rows, ranks = cdiv(m, config.BLOCK_ROWS), cdiv(r, block_r)
    wanted = config.programs_per_sm * num_sms(dy.device)
    parts, _ = split(max(splits.sizes), config.BLOCK_COLS, rows * ranks * groups, wanted)
    dh_parts = db_parts = None
    if needs_dh:
        dh_parts = torch.empty((parts, m, groups * r), dtype=torch.float32, device=dy.device)
    if needs_db:
        db_parts = torch.empty((rows, b_rows, r), dtype=torch.float32, device=dy.device)
    launch(
        _grad_b_kernel,
        (rows * ranks, groups * parts),
        dy=matrix(dy),
        b=matrix(b),
        h_ptr=h if needs_db else None,
        dh_ptr=dh_parts,
        db_ptr=db_parts,
        col_scale=col_scale,
        M=m,
        R=r,
        rank_total=groups * r,
        b_rows=b_rows,
        sizes=splits.sizes,
        parts=parts,
        scale_dh=spec.scaling * dropout.keep_scale(spec.dropout_p),
        scale_db=spec.scaling,
        ENABLED=splits.enabled,
        NUMERICS=numerics,
        TERMS=terms,
        APART=are_apart(dy.device),
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_COLS,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if needs_dh and needs_db:
        return split_k_reduce_both(dh_parts, numerics.dh, db_parts, dtype)
    if needs_dh:
        return split_k_reduce(dh_parts, numerics.dh), db
    return None, split_k_reduce(db_parts, dtype)


def _db_alone(dy: Tensor, h: Tensor, spec: LoraSpec, r: int, numerics: Numerics) -> Tensor:
    """db in float32 by grad_a's kernel, a group at a time. Shapes as in grad_b."""
    parts = [
        grad_a(h[:, ranks].contiguous(), dy[:, columns], None, 0.0, torch.float32, numerics)
        for columns, _, ranks in spec.splits.groups(r)
    ]
    return (torch.cat(parts, 1).T * spec.scaling).contiguous()
