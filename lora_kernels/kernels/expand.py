"""out = mask ∘ (scale · left · right) + bias, to which cuBLAS then adds the large product.

One program owns one tile of out: BLOCK_M rows and BLOCK_N columns of one group. The forward fills y
with scaling · h · bᵀ + bias, the backward fills dx with mask ∘ (dh · a). Columns of a disabled
group get the bias alone. With ADD out holds a large product already, which gets the update: then
columns of a disabled group are neither read nor written. With a mask it is applied to the sum.

With a magnitude col_scale multiplies the columns of that sum before bias is added. If dropout acts
on the large product, too, which is x_hat · wᵀ then, the sum stays in out, and y gets what x · wᵀ
lacks to be the layer's: col_scale ∘ sum - product + bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, select, target_of
from lora_kernels.kernels.dropout import Mask, keep_tile
from lora_kernels.kernels.launch import cdiv, launch, mask, matrix, rank_block
from lora_kernels.kernels.numerics import Numerics, bits_of
from lora_kernels.kernels.tile import (
    Matrix,
    add_bias,
    add_low_rank,
    count_tiles,
    load_tile,
    locate,
    part_of,
    scale_columns,
    store_tile,
    swizzle,
)
from lora_kernels.spec import LoraSpec, OutputSplits

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[
        (When(bits=32), SkinnyConfig(32, 32, num_warps=4, num_stages=1)),
        (When(r=16), SkinnyConfig(64, 128, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(32, 64, num_warps=4, num_stages=1)),
    ],
    sm_90=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=1)),
    ],
    sm_100=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(64, 128, num_warps=8, num_stages=1)),
    ],
    hip=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
    ],
    other=[
        (When(bits=32), SkinnyConfig(64, 64, num_warps=8, num_stages=1)),
        (When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1)),
    ],
)


@triton.jit(do_not_specialize=["M"])
def _expand_kernel(
    left_ptr, right, bias, col_scale, mask, out, y,
    M, R, rank_total, sizes, scale,
    ADD: tl.constexpr, LAYERS: tl.constexpr, ENABLED: tl.constexpr,
    RIGHT_T: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
):  # fmt: skip
    left = Matrix(left_ptr, rank_total)
    tiles_n = count_tiles(sizes, ENABLED, BLOCK_N)
    tile_m, tile_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, 8)
    row = tl.cast(tile_m, tl.int64) * BLOCK_M
    column, end, right_row, group, enabled = locate(tile_n, sizes, ENABLED, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if enabled:
        # Not unrolled: the masks of several layers at once do not fit into registers.
        for layer in tl.range(LAYERS):
            of_layer = tl.cast(layer, tl.int64)
            update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if ADD and mask is not None:
                update = load_tile(out, row, column, M, end, BLOCK_M, BLOCK_N).to(tl.float32)
            update = add_low_rank(
                update,
                part_of(left, of_layer * M, group * R),
                part_of(right, of_layer * R, 0),
                row,
                right_row,
                scale,
                M,
                right_row + end - column,
                R,
                RIGHT_T,
                NUMERICS,
                BLOCK_R,
                RANK_BLOCKS,
            )
            if mask is not None:
                seed = tl.load(mask.seed + layer)
                keep = keep_tile(seed, mask.threshold, row, column, BLOCK_M, BLOCK_N)
                update = tl.where(keep, update, 0.0)
            if LAYERS == 1:  # the compiler would keep an addition to zeros
                acc = update
            else:
                acc += update
    written = enabled if ADD else 1
    if written:
        if ADD and mask is None:
            product = load_tile(out, row, column, M, end, BLOCK_M, BLOCK_N).to(tl.float32)
            acc += product
        if y is not None:
            lacking = scale_columns(acc, col_scale, column, end) - product
            store_tile(y, add_bias(lacking, bias, column, end), row, column, M, end)
        else:
            acc = scale_columns(acc, col_scale, column, end)
            acc = add_bias(acc, bias, column, end)
        store_tile(out, acc, row, column, M, end)


def config_for(device: torch.device, r: int, numerics: Numerics) -> SkinnyConfig:
    """The entry of TILES that serves rank r."""
    return select(TILES, target_of(device), bits_of(numerics.update), r=r)


def expand_y(
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    dtype: torch.dtype,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """scaling·h_g·b_gᵀ + bias in dtype.

    Shapes: h [M, E·r], b [rows of the enabled groups, r], bias [N] -> [M, N].
    """
    y = torch.empty((h.shape[0], spec.splits.columns), dtype=dtype, device=h.device)
    _launch_y(y, h, b, spec, numerics, config, bias=bias, ADD=False)
    return y


def expand_add_y(
    y: Tensor,
    h: Tensor,
    b: Tensor,
    spec: LoraSpec,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """y, after scaling·h_g·b_gᵀ was added in place to the columns of each enabled group.

    The sum is rounded once. numerics: those of y, which may have another dtype than x.
    Shapes: y [M, N], rows of unit stride; h [M, E·r], b [rows of the enabled groups, r].
    """
    _launch_y(y, h, b, spec, numerics, config, bias=None, ADD=True)
    return y


def expand_scale_y(
    y: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    col_scale: Tensor,
    spec: LoraSpec,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """y, after it became col_scale∘(y + scaling·h·bᵀ) + bias in place; for one group.

    Shapes: as in expand_add_y; col_scale [N] float32.
    """
    own = {"bias": bias, "ADD": True, "col_scale": col_scale}
    _launch_y(y, h, b, spec, numerics, config, **own)
    return y


def expand_split_y(
    c: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    col_scale: Tensor,
    spec: LoraSpec,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """c + scaling·h·bᵀ in place, and y = col_scale∘(that) - c + bias, for one group.

    c: x_hat·wᵀ [M, N], rows of unit stride. Shapes: as in expand_scale_y.
    """
    y = torch.empty(c.shape, dtype=c.dtype, device=c.device)
    own = {"bias": bias, "ADD": True, "col_scale": col_scale, "y": matrix(y)}
    _launch_y(c, h, b, spec, numerics, config, **own)
    return c, y


def expand_mask_dx(
    dx: Tensor,
    dh: Tensor,
    a: Tensor,
    seed: Tensor,
    dropout_p: float,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """dx, after it became mask ∘ (dx + dh·a) in place; dh includes the mask's scale.

    Shapes: dx [M, K] of unit stride, dh [M, R], a [R, K].
    """
    _launch_dx(dx, dh, a, mask(seed, dropout_p), numerics, config, ADD=True)
    return dx


def expand_dx(
    dh: Tensor,
    a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    numerics: Numerics,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """mask ∘ (dh·a) in dtype; dh includes the mask's scale. dh [M, R], a [R, K] -> [M, K].

    For L layers that share x, their sum: dh [L, M, R], a [L, R, K], seed [L] -> [M, K].
    """
    dx = torch.empty((dh.shape[-2], a.shape[-1]), dtype=dtype, device=dh.device)
    _launch_dx(dx, dh, a, mask(seed, dropout_p), numerics, config, ADD=False)
    return dx


def _launch_y(
    out: Tensor,
    h: Tensor,
    b: Tensor,
    spec: LoraSpec,
    numerics: Numerics,
    config: SkinnyConfig | None,
    **own,
) -> None:
    own |= {"mask": None, "scale": spec.scaling, "RIGHT_T": True}
    _launch(h, b, out, b.shape[1], spec.splits, numerics, config, **own)


def _launch_dx(
    out: Tensor,
    dh: Tensor,
    a: Tensor,
    mask: Mask | None,
    numerics: Numerics,
    config: SkinnyConfig | None,
    **own,
) -> None:
    r, k = a.shape[-2:]
    own |= {"bias": None, "mask": mask, "scale": 1.0, "RIGHT_T": False}
    _launch(dh, a, out, r, OutputSplits.whole(k), numerics, config, **own)


def _launch(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    r: int,
    splits: OutputSplits,
    numerics: Numerics,
    config: SkinnyConfig | None,
    col_scale: Tensor | None = None,
    y: Matrix | None = None,
    **own,
) -> None:
    config = config or config_for(left.device, r, numerics)
    m, block_r = len(out), rank_block(r, numerics.update)
    columns = sum(cdiv(size, config.BLOCK_COLS) for size in splits.sizes)
    launch(
        _expand_kernel,
        (cdiv(m, config.BLOCK_ROWS) * columns,),
        left_ptr=left,
        right=matrix(right),
        out=matrix(out),
        col_scale=col_scale,
        y=y,
        M=m,
        R=r,
        rank_total=left.shape[-1],
        sizes=splits.sizes,
        LAYERS=left.shape[:-2].numel(),
        ENABLED=splits.enabled,
        NUMERICS=numerics,
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_COLS,
        BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **own,
    )
