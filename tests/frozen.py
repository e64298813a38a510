"""A layer with a weight of 8 bits that is nobody's, and its frozen weight."""

import torch
from torch import Tensor, nn

from lora_kernels.quantization import FrozenWeight


class Int8Linear(nn.Module):
    """x·wᵀ + bias with w = codes·scale, in x's dtype; keeps what it is asked in `calls`."""

    def __init__(self, n, k, *, bias=True, dtype=torch.float32, device="cpu"):
        super().__init__()
        codes = torch.randint(-127, 128, (n, k)).to(device, torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", (torch.rand(n, 1) + 0.5).to(device) / (127 * k**0.5))
        held = torch.randn(n).to(device, dtype) if bias else None
        self.bias = None if held is None else nn.Parameter(held, requires_grad=False)

    def dense(self, dtype) -> Tensor:
        return (self.codes * self.scale).to(dtype)

    def forward(self, x):
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)


class Int8Weight(FrozenWeight):
    """The frozen weight of an Int8Linear."""

    def dense(self, dtype):
        return self.layer.dense(dtype)


def int8_weight(layer: Int8Linear, exact: bool = True, dtype=None) -> Int8Weight:
    return Int8Weight(layer, tuple(layer.codes.shape), layer.codes.device, dtype, "int8", exact)
