"""dense(): the matrix of a frozen weight, by a kernel if there is one for it."""

import functools

import torch
from torch import Tensor

from lora_kernels.dispatch.algorithm import choose
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.ops.library import compute, define
from lora_kernels.quantization import FourBit, FrozenWeight
from lora_kernels.reference import dequantize as reference

__all__ = ["dense"]


def dense(frozen: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """frozen.dense(dtype), which its library computes, but for 4-bit weights on a GPU."""
    shape = _shape(frozen.shape, dtype, frozen.device)
    w = None if choose(shape).name == "reference" else frozen.four_bit()
    if w is None:
        return frozen.dense(dtype)
    absmax2, code2, blocksize2, offset = w.nested or (None, None, 1, None)
    return _op(
        w.packed, w.absmax, w.code, w.blocksize, *w.shape, dtype, absmax2, code2, blocksize2, offset
    )


def _shape(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> GemmShape:
    n, k = shape
    return GemmShape(m=k, n=n, k=k, r=1, dtype=dtype, device=device, dropout=False)


def _dense_4bit(packed, absmax, code, blocksize, n, k, dtype, *nested):
    w = FourBit(packed, absmax, code, blocksize, (n, k), None if nested[0] is None else nested)
    shape = functools.partial(_shape, (n, k), dtype, packed.device)
    return compute(reference, "dense_4bit", shape, (w, dtype), (packed,))


def _fake(packed, absmax, code, blocksize, n, k, dtype, *_):
    return packed.new_empty((n, k), dtype=dtype)


_op = define(
    "dense_4bit",
    "(Tensor packed, Tensor absmax, Tensor code, int blocksize, SymInt n, SymInt k, "
    "ScalarType dtype, Tensor? absmax2, Tensor? code2, int blocksize2, Tensor? offset) -> Tensor",
    _dense_4bit,
    None,
    _fake,
)
