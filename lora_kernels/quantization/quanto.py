"""Frozen weights of optimum-quanto: QLinear, which transformers' QuantoConfig makes too."""

import torch
from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import TRAINED, FrozenWeight, NotFrozen

__all__ = ["linear"]


class Quanto(FrozenWeight):
    """The weight of a QLinear, which is a tensor in 2, 4 or 8 bits with scales of its dtype."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.layer.weight.dequantize().contiguous().to(dtype)


def linear(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of a QLinear that is frozen, in quanto's sense and in PyTorch's."""
    weight = layer.weight
    if type(weight) in (Tensor, nn.Parameter):
        return NotFrozen("its weight is not quantised yet: call optimum.quanto.freeze(model)")
    if layer.activation_qtype is not None:
        return NotFrozen("it quantises its activations: quantise the weights alone")
    with torch._C.DisableTorchFunctionSubclass():  # attributes of such tensors are slow without
        if weight.requires_grad:
            return NotFrozen(TRAINED)
        shape, device, dtype = tuple(weight.shape), weight.device, weight.dtype
    return Quanto(layer, shape, device, dtype, layer.weight_qtype.name, True)
