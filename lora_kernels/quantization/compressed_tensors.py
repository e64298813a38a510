"""Frozen weights of compressed-tensors, as transformers loads them.

With use_optimized_inference=True a float8 weight is in a CompressedTensorsFP8Linear, which is
taken. Otherwise it is in an nn.Linear with a forward of its own, which decompresses it for good;
that layer is refused. With dequantize=True layers are dense from the start.
"""

import torch
from torch import Tensor

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import TRAINED, FrozenWeight, NotFrozen

__all__ = ["linear_fp8"]


class Rows(FrozenWeight):
    """The weight of a CompressedTensorsFP8Linear: float8 [N, K], and scales [1, N]."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        layer = self.layer
        return layer.weight.detach().float().mul_(layer.weight_scale.detach().T).to(dtype)


def linear_fp8(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of a CompressedTensorsFP8Linear. Never exact: the layer rounds x to 8 bits."""
    weight = layer.weight
    if weight.requires_grad:
        return NotFrozen(TRAINED)
    return Rows(layer, tuple(weight.shape), weight.device, None, "float8", False)
