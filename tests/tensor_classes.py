"""Tensors of other classes than PyTorch's, as quantisers make them."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Halves(Tensor):
    """A weight that keeps half of its values and knows three operations, as torchao's weights do.

    It stands for 2·half. All that it can do is detach, transpose and F.linear.
    """

    @staticmethod
    def __new__(cls, value: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )

    def __init__(self, value: Tensor):
        self.half = value.detach() / 2

    def dequantize(self) -> Tensor:
        return self.half * 2

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias)
        if func in (F.embedding, F.conv2d):
            dense = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
            return func(*dense, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].dequantize())
        raise NotImplementedError(f"{cls.__name__} does not know {func}")
