"""Frozen weights of HQQ: HQQLinear."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import FrozenWeight, NotFrozen

__all__ = ["linear"]

# What HQQLinear.set_backend() makes the forward of the class. Others need a library of kernels.
_FORWARDS = ("forward_pytorch", "forward_pytorch_backprop", "forward_pytorch_backprop_compile")


class _Held(NamedTuple):
    """What an HQQLinear dequantises; a class that torch.compile takes."""

    ready: bool
    W_q: Tensor
    meta: dict


class Grouped(FrozenWeight):
    """The weight of an HQQLinear: 1 to 8 bits, a scale and a zero for each group.

    The layer computes its matrix in compute_dtype, and so does dense().
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        layer = self.layer
        # dequantize() puts what it computes into the layer's meta and takes it out again, so it
        # is called on a copy.
        copy = _Held(True, layer.W_q.detach(), dict(layer.meta))
        return type(layer).dequantize(copy).to(dtype)


def linear(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of an HQQLinear."""
    if not layer.ready:
        return NotFrozen("it is not quantised yet: call its initialize()")
    name = type(layer).forward.__name__
    if name not in _FORWARDS:
        return NotFrozen(f"its backend is {name}: HQQLinear.set_backend(HQQBackend.PYTORCH)")
    meta = layer.meta
    dtype = meta.get("compute_dtype", torch.float16)  # as its dequantize() takes it
    kind = f"hqq, {meta['nbits']} bits"
    return Grouped(layer, tuple(meta["shape"]), layer.W_q.device, dtype, kind, True)
