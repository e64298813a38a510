"""Operands surrounded by NaN, and outputs that must be written completely and nowhere else."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from lora_kernels.testing.tolerance import require

__all__ = ["between_nan", "guarded_outputs"]

_PAD = 64  # elements, so that the tensor between two of these stays aligned to 16 bytes


def between_nan(tensor: Tensor, aligned: bool = True) -> Tensor:
    """A copy of a vector, matrix or stack of these inside a buffer that is NaN everywhere else.

    aligned: whether its rows start at multiples of 16 bytes.
    """
    if tensor.dim() == 1:
        buffer = torch.full((len(tensor) + 2 * _PAD,), torch.nan).to(tensor)
        buffer[_PAD : _PAD + len(tensor)] = tensor
        return buffer[_PAD : _PAD + len(tensor)]
    *stack, rows, cols = tensor.shape
    width = -(-cols // 8) * 8 + 16 if aligned else (cols + 17) | 1
    first = 8 if aligned else 9
    buffer = torch.full((*stack, rows + 2, width), torch.nan).to(tensor)
    inside = buffer[..., 1:-1, first : first + cols]
    return inside.copy_(tensor)


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Fresh tensors are full of NaN and lie between NaN.

    Raises: AssertionError if at the end a NaN is left in one, or one around it is overwritten.
    """
    buffers, empty = [], torch.empty

    def guarded_empty(*shape, **options):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 2 * _PAD, **options)
        if not buffer.is_floating_point():
            return empty(shape, **options)
        buffer.fill_(torch.nan)
        buffers.append(buffer)
        return buffer[_PAD : _PAD + count].view(shape)

    with mock.patch("torch.empty", guarded_empty):
        yield
    require(bool(buffers), "there was no output")
    for buffer in buffers:
        front, output, back = buffer[:_PAD], buffer[_PAD:-_PAD], buffer[-_PAD:]
        require(bool(front.isnan().all()), "written in front of an output")
        require(bool(back.isnan().all()), "written behind an output")
        require(not output.isnan().any(), "an element of an output was not written")
