"""w = code[nibble] · absmax: the dense weight [N, K] out of a 4-bit one, in one launch.

One program owns BLOCK_M · BLOCK_N weights that lie one after the other, as rows of BLOCK_N. A row
lies in one block of weights, so it has one absmax. A byte holds two weights, the first in its upper
half. Nested statistics hold absmax itself in 8 bits: absmax = code2[byte] · absmax2 + offset.

The bits are those of bitsandbytes, which rounds that product, then the sum, then the product of a
weight in float32, then the weight to its dtype. So a product and a sum may not become one
instruction that rounds once: the kernel is compiled without contraction.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import SkinnyConfig, Tiles, When, select, target_of
from lora_kernels.kernels.launch import cdiv, launch, on_device_of
from lora_kernels.quantization import FourBit

TILES = Tiles(
    interpreter=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_80=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_90=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    sm_100=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    hip=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
    other=[(When(), SkinnyConfig(64, 64, num_warps=4, num_stages=1))],
)


class _Nested(NamedTuple):
    """The statistics of an 8-bit absmax, as the kernel gets them."""

    absmax: Tensor
    code: Tensor
    offset: Tensor


@triton.jit
def _absmax_of(absmax_ptr, nested, block, inside, NESTED_BLOCK: tl.constexpr):
    """The absmax of blocks of weights, in float32."""
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if nested is not None:
        scale = tl.load(nested.absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        absmax = tl.load(nested.code + absmax.to(tl.int32)) * scale + tl.load(nested.offset)
    return absmax


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested, out_ptr,
    size, pairs,
    ROWS_PER_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    offs = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    inside = offs < pairs - first * HALF
    packed = tl.load(packed_ptr + first * HALF + offs, mask=inside, other=0).to(tl.int32)
    row = first + rows
    absmax = _absmax_of(
        absmax_ptr, nested, row // ROWS_PER_BLOCK, row * BLOCK_N < size, NESTED_BLOCK
    )[:, None]
    upper = tl.load(code_ptr + (packed >> 4)) * absmax
    lower = tl.load(code_ptr + (packed & 15)) * absmax
    out = tl.join(upper, lower).reshape(BLOCK_M, BLOCK_N)
    offs = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = offs < size - first * BLOCK_N
    tl.store(out_ptr + first * BLOCK_N + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


def config_for(device: torch.device, dtype: torch.dtype) -> SkinnyConfig:
    """The entry of TILES that serves weights in dtype."""
    return select(TILES, target_of(device), 8 * dtype.itemsize)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: tuple[Tensor, Tensor, int, Tensor] | None,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """The weight [N, K] in dtype: code[nibble] · absmax of its block of blocksize weights.

    Blocks run over the rows one after the other, and the last may be shorter. nested: (absmax2,
    code2, blocksize2, offset) of an absmax in 8 bits, which is code2[absmax] · absmax2 + offset in
    blocks of blocksize2. Both sizes of blocks are powers of two from 2 on. All is contiguous.
    Shapes: packed uint8, ceil(N·K / 2) bytes; absmax [ceil(N·K / blocksize)], uint8 if nested, else
    float32; absmax2 [ceil(len(absmax) / blocksize2)]; code [16], code2 [256]; offset: one number.
    What is not uint8 is float32.
    """
    config = config or config_for(packed.device, dtype)
    absmax2, code2, blocksize2, offset = nested or (None, None, 1, None)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    size, columns = out.numel(), min(config.BLOCK_COLS, blocksize)
    rows = config.BLOCK_ROWS * config.BLOCK_COLS // columns
    with on_device_of(packed):
        launch(
            _dequantize_kernel,
            (cdiv(size, rows * columns),),
            packed_ptr=packed,
            absmax_ptr=absmax,
            code_ptr=code,
            nested=nested and _Nested(absmax2, code2, offset),
            out_ptr=out,
            size=size,
            pairs=cdiv(size, 2),
            ROWS_PER_BLOCK=blocksize // columns,
            NESTED_BLOCK=blocksize2,
            BLOCK_M=rows,
            BLOCK_N=columns,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
    return out


def dense_4bit(algorithm: str, w: FourBit, dtype: torch.dtype) -> Tensor:
    """reference.dequantize.dense_4bit; both algorithms are one kernel."""
    return dequantize_4bit(*w[:5], dtype, w.nested)
