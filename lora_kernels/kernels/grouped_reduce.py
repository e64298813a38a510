"""out[g] = scale_g · (the parts of group g, added in order); zeros if it has none.

One program owns BLOCK elements of one group's output. Which parts are a group's, a sort of their
groups says. Parts are the gradients of chunks of rows, or rows of dx that came from one row of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import cdiv, launch

BLOCK = 512


class Members(NamedTuple):
    """The parts of each group: those of group g are order[first[g] : first[g + 1]], ascending.

    first: int32 [G + 1]; order: int64.
    """

    first: Tensor
    order: Tensor


def members_of(group_of_part: Tensor, groups: int) -> Members:
    """The parts of each group, by the number of each part's group; another number is no group's."""
    ordered, order = torch.sort(group_of_part, stable=True)
    numbers = torch.arange(groups + 1, dtype=ordered.dtype, device=ordered.device)
    return Members(torch.searchsorted(ordered, numbers, out_int32=True), order)


@triton.jit
def _grouped_reduce_kernel(parts_ptr, members, scales, out_ptr, numel, BLOCK: tl.constexpr):
    blocks = tl.cdiv(numel, BLOCK)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(tl.load(members.first + group), tl.load(members.first + group + 1)):
        part = tl.load(members.order + i)
        acc += tl.load(parts_ptr + part * numel + offs, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        acc *= tl.load(scales + group)
    out_ptr += tl.cast(group, tl.int64) * numel
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_reduce(
    parts: Tensor, members: Members, scales: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale_g·(the sum of each group's parts), rounded once. Shapes: [parts, ...] -> [G, ...].

    scales: float32 [G], None for 1.
    """
    groups = members.first.shape[0] - 1
    out = torch.empty((groups, *parts.shape[1:]), dtype=dtype, device=parts.device)
    numel = parts.shape[1:].numel()
    launch(
        _grouped_reduce_kernel,
        (groups * cdiv(numel, BLOCK),),
        parts_ptr=parts,
        members=members,
        scales=scales,
        out_ptr=out,
        numel=numel,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out
