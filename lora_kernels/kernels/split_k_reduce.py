"""out = parts[0] + parts[1] + …, in a fixed order. One program owns BLOCK elements of an output.

A launch takes the parts of one output or of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import cdiv, launch

BLOCK = 256
AT_ONCE = 8  # parts: a sum waits for memory, so many of its loads are under way


@triton.jit
def _sum(parts_ptr, out_ptr, block, parts, numel, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        offs_part = tl.cast(part, tl.int64)[:, None] * numel + offs[None, :]
        inside = (part < parts)[:, None] & mask[None, :]
        acc += tl.sum(tl.load(parts_ptr + offs_part, mask=inside, other=0.0), axis=0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "second_parts"])
def _split_k_reduce_kernel(
    parts_ptr, out_ptr, parts, numel,
    second_ptr, second_out_ptr, second_parts, second_numel,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(0), tl.cdiv(numel, BLOCK)
    if second_ptr is not None:  # noqa: SIM102 - the outer if is decided at compile time
        if block >= blocks:
            _sum(
                second_ptr,
                second_out_ptr,
                block - blocks,
                second_parts,
                second_numel,
                BLOCK,
                AT_ONCE,
            )
    if block < blocks:
        _sum(parts_ptr, out_ptr, block, parts, numel, BLOCK, AT_ONCE)


def split_k_reduce(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, rounded once. Shapes: [S, ...] float32 -> [...] dtype."""
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = _out(parts, dtype)
    _launch(parts, out)
    return out


def split_k_reduce_both(
    first: Tensor, first_dtype: torch.dtype, second: Tensor, second_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """split_k_reduce of two, in one launch if both have something to sum or to round."""
    if _is_done(first, first_dtype) or _is_done(second, second_dtype):
        return split_k_reduce(first, first_dtype), split_k_reduce(second, second_dtype)
    out, second_out = _out(first, first_dtype), _out(second, second_dtype)
    _launch(first, out, second, second_out)
    return out, second_out


def _is_done(parts: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is one part, in this dtype: nothing to sum or to round."""
    return parts.shape[0] == 1 and parts.dtype == dtype


def _out(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)


def _launch(
    parts: Tensor, out: Tensor, second: Tensor | None = None, second_out: Tensor | None = None
) -> None:
    numel, second_parts, second_numel = out.numel(), 0, 0
    if second is not None:
        second_parts, second_numel = second.shape[0], second_out.numel()
    launch(
        _split_k_reduce_kernel,
        (cdiv(numel, BLOCK) + cdiv(second_numel, BLOCK),),
        parts_ptr=parts,
        out_ptr=out,
        parts=parts.shape[0],
        numel=numel,
        second_ptr=second,
        second_out_ptr=second_out,
        second_parts=second_parts,
        second_numel=second_numel,
        BLOCK=BLOCK,
        AT_ONCE=AT_ONCE,
    )
