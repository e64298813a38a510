"""Small float32 products on a CPU, by PyTorch's own operators and their autograd.

There the op's checks, mask and bookkeeping take longer than what they save. The formula is the
same. Two things differ: autograd keeps what its operators need, with dropout the mask and the
dropped-out x too, which is less than three megabytes; and the mask is that of F.dropout, so it
follows from the state of PyTorch's generator, as in PEFT and loralib. That state may be the same on
all ranks, which are to have masks of their own: with dropout several ranks take the op.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch.algorithm import is_free
from lora_kernels.functional.seeds import is_alone
from lora_kernels.reference.linear import shaped_like
from lora_kernels.spec import LoraSpec

__all__ = ["LARGEST", "is_small", "small_lora_linear"]

# m·n·k up to which PyTorch's operators are as fast as the op: for 768 x 768, 254 rows. Measured
# with one thread; and elements of x or y, so that little is kept.
LARGEST = 150_000_000
_MOST_ELEMENTS = 1 << 18
_LARGEST_SCALING = sys.float_info.max


def is_small(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, spec: LoraSpec
) -> bool:
    """Whether small_lora_linear computes a call: valid, float32, on a CPU, and small.

    Nothing stands in the op's way, see ops/obstacle.py, so all are plain tensors. Not under
    torch.compile, nor if LORA_KERNELS_PLAN or TRITON_INTERPRET asks for an algorithm.
    """
    if not (
        not torch.compiler.is_compiling()  # else the sizes below would be guarded
        and 0 < (elements := x.numel()) <= _MOST_ELEMENTS
        and is_free()
        and x.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and a.dtype is torch.float32
        and b.dtype is torch.float32
        and weight.is_cpu
        and a.is_cpu
        and b.is_cpu
    ):
        return False
    if bias is not None and not (
        bias.dtype is torch.float32
        and bias.is_cpu
        and bias.layout is torch.strided
        and bias.shape == weight.shape[:1]
    ):
        return False
    n, k = weight.shape if weight.dim() == 2 else (0, 0)
    return (
        x.dim() > 0
        and x.shape[-1] == k
        and elements * n <= LARGEST
        and elements * n <= _MOST_ELEMENTS * k
        and b.dim() == 2
        and b.shape[0] == n
        and x.layout is torch.strided
        and weight.layout is torch.strided
        and a.layout is torch.strided
        and b.layout is torch.strided
        and b.shape[1] > 0
        and a.shape == (b.shape[1], k)
        and spec.splits.enabled == (True,)
        and type(spec.scaling) in (float, int)
        and -_LARGEST_SCALING <= spec.scaling <= _LARGEST_SCALING
        and type(spec.dropout_p) in (float, int)
        and 0 <= spec.dropout_p < 1
        and (spec.dropout_p == 0 or is_alone())
        and not torch.is_autocast_enabled("cpu")
    )


def small_lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, spec: LoraSpec
) -> Tensor:
    """y = x·weightᵀ + bias + scaling·(dropout(x)·aᵀ)·bᵀ; shapes as in reference/linear.py."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    x_hat = F.dropout(rows, spec.dropout_p) if spec.dropout_p > 0 else rows
    h = F.linear(x_hat, a) * spec.scaling
    y = F.linear(rows, weight, bias).addmm_(h, b.t())
    return shaped_like(x, y)
