"""Frozen weights of transformers' FP8Linear (FineGrainedFP8Config).

Its forward needs a GPU or an XPU; what is tested without one is dense(), on layers of its class.
"""

import torch
from torch import Tensor

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import DENSE, TRAINED, FrozenWeight, NotFrozen

__all__ = ["linear"]


class Blocks(FrozenWeight):
    """The weight of an FP8Linear: float8 [N, K], with a scale for each block of it, or for all."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        layer = self.layer
        w, scales = layer.weight.detach().float(), layer.weight_scale_inv.detach().float()
        if layer.block_size is None:
            return w.mul_(scales).to(dtype)
        (n, k), (height, width) = w.shape, layer.block_size
        of_rows = scales.repeat_interleave(height, 0)[:n]
        whole = k // width
        w[:, : whole * width].unflatten(1, (whole, width)).mul_(of_rows[:, :whole, None])
        w[:, whole * width :].mul_(of_rows[:, whole:])
        return w.to(dtype)


def linear(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of an FP8Linear. It is never exact: the layer rounds x to 8 bits."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return NotFrozen("its weight is packed FP4, over which transformers has no backward either")
    if weight.element_size() > 1:
        return NotFrozen(DENSE, TypeError)
    if weight.requires_grad:
        return NotFrozen(TRAINED)
    return Blocks(layer, tuple(weight.shape), weight.device, None, "float8", False)
