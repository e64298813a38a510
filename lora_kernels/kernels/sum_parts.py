"""out = parts[0] + parts[1] + …, in this order. One program owns BLOCK elements of an output.

A launch takes the parts of one output or of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import cdiv, launch

BLOCK = 1024


@triton.jit
def _sum(parts_ptr, out_ptr, block, parts, numel, BLOCK: tl.constexpr):
    offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        offs_part = tl.cast(part, tl.int64) * numel
        acc += tl.load(parts_ptr + offs_part + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "second_parts"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, parts, numel,
    second_ptr, second_out_ptr, second_parts, second_numel,
    TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.cdiv(numel, BLOCK)
    if TWO:  # noqa: SIM102 - decided when it is compiled
        if block >= blocks:
            _sum(second_ptr, second_out_ptr, block - blocks, second_parts, second_numel, BLOCK)
    if block < blocks:
        _sum(parts_ptr, out_ptr, block, parts, numel, BLOCK)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, rounded once. Shapes: [S, ...] float32 -> [...] dtype."""
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    numel = out.numel()
    launch(
        _sum_parts_kernel, (cdiv(numel, BLOCK),),
        parts, out, parts.shape[0], numel, None, None, 0, 0, TWO=False, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def _is_done(parts: Tensor, dtype: torch.dtype) -> bool:
    """Whether the only part is the sum, as it is."""
    return parts.shape[0] == 1 and parts.dtype == dtype


def sum_both(
    first: Tensor, first_dtype: torch.dtype, second: Tensor, second_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum_parts of two, in one launch where both have something to sum or to round."""
    if _is_done(first, first_dtype) or _is_done(second, second_dtype):
        return sum_parts(first, first_dtype), sum_parts(second, second_dtype)
    out, second_out = (
        torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
        for parts, dtype in ((first, first_dtype), (second, second_dtype))
    )
    numel, second_numel = out.numel(), second_out.numel()
    launch(
        _sum_parts_kernel, (cdiv(numel, BLOCK) + cdiv(second_numel, BLOCK),),
        first, out, first.shape[0], numel,
        second, second_out, second.shape[0], second_numel, TWO=True, BLOCK=BLOCK,
    )  # fmt: skip
    return out, second_out
