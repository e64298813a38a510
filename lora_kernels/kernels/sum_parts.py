"""out = parts[0] + parts[1] + …, in this order. One program owns BLOCK elements of out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import cdiv, launch

BLOCK = 1024


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(parts_ptr, out_ptr, parts, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        offs_part = tl.cast(part, tl.int64) * numel
        acc += tl.load(parts_ptr + offs_part + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, rounded once. Shapes: [S, ...] float32 -> [...] dtype."""
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    grid = (cdiv(out.numel(), BLOCK),)
    launch(_sum_parts_kernel, grid, parts, out, parts.shape[0], out.numel(), BLOCK=BLOCK)
    return out
