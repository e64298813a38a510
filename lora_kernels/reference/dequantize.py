"""A weight of 4 bits made dense, in plain PyTorch: the specification of the kernel, its oracle."""

import torch
from torch import Tensor

from lora_kernels.quantization import FourBit

__all__ = ["dense_4bit"]


def dense_4bit(w: FourBit, dtype: torch.dtype, acc: torch.dtype = torch.float32) -> Tensor:
    """w [N, K] in dtype; every step before is rounded to acc.

    With float32 these are the bits that bitsandbytes makes.
    """
    absmax, size = w.absmax.to(acc), w.shape[0] * w.shape[1]
    if w.nested is not None:
        absmax2, code2, blocksize2, offset = w.nested
        scale = absmax2.to(acc).repeat_interleave(blocksize2)[: len(absmax)]
        absmax = code2.to(acc)[w.absmax.int()] * scale + offset.to(acc)
    numbers = torch.stack([w.packed >> 4, w.packed & 15], -1).flatten()[:size].int()
    dense = w.code.to(acc)[numbers]
    return (dense * absmax.repeat_interleave(w.blocksize)[:size]).view(w.shape).to(dtype)
