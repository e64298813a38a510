"""The column sums of dy ∘ (z - bias). One program owns BLOCK_N columns and one slice of the rows.

The gradient of a magnitude is made of them. split_k_reduce adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, num_sms, select, target_of
from lora_kernels.kernels.launch import cdiv, launch, matrix, split
from lora_kernels.kernels.split_k_reduce import split_k_reduce
from lora_kernels.kernels.tile import load_tile

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[(When(), SkinnyConfig(32, 64, num_warps=4, num_stages=3))],
    sm_90=[(When(), SkinnyConfig(32, 64, num_warps=4, num_stages=3))],
    sm_100=[(When(), SkinnyConfig(32, 64, num_warps=4, num_stages=3))],
    hip=[(When(), SkinnyConfig(32, 64, num_warps=4, num_stages=2))],
    other=[(When(), SkinnyConfig(32, 64, num_warps=4, num_stages=2))],
)


@triton.jit(do_not_specialize=["M"])
def _column_sums_kernel(
    dy, z, bias, sums_ptr,
    M, N, m_slice,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    first_m = tl.cast(part, tl.int64) * m_slice
    end = min(first_m + m_slice, M)
    offs = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.cdiv(tl.maximum(end - first_m, 0), BLOCK_M)):
        row = first_m + step * BLOCK_M
        left = load_tile(dy, row, column, end, N, BLOCK_M, BLOCK_N).to(tl.float32)
        right = load_tile(z, row, column, end, N, BLOCK_M, BLOCK_N).to(tl.float32)
        if bias is not None:
            right -= tl.load(bias + offs, mask=offs < N, other=0.0).to(tl.float32)[None, :]
        acc += left * right
    offs_sums = tl.cast(part, tl.int64) * N + offs
    tl.store(sums_ptr + offs_sums, tl.sum(acc, 0), mask=offs < N)


def config_for(device: torch.device, dtype: torch.dtype) -> SkinnyConfig:
    """The entry of TILES that serves dy in dtype."""
    return select(TILES, target_of(device), 8 * dtype.itemsize)


def column_sums(
    dy: Tensor, z: Tensor, bias: Tensor | None, config: SkinnyConfig | None = None
) -> Tensor:
    """The sums over rows of dy∘(z - bias) in float32.

    Shapes: dy and z [M, N] with a unit inner stride, bias [N] -> [N].
    """
    m, n = dy.shape
    config = config or config_for(dy.device, dy.dtype)
    programs = cdiv(n, config.BLOCK_COLS)
    wanted = config.programs_per_sm * num_sms(dy.device)
    parts, m_slice = split(m, config.BLOCK_ROWS, programs, wanted)
    sums = torch.empty((parts, n), dtype=torch.float32, device=dy.device)
    launch(
        _column_sums_kernel,
        (programs, parts),
        dy=matrix(dy),
        z=matrix(z),
        bias=bias,
        sums_ptr=sums,
        M=m,
        N=n,
        m_slice=m_slice,
        BLOCK_M=config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_COLS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return split_k_reduce(sums, torch.float32)
