"""What every frozen weight has to be, whatever library it is of."""

import pytest
import torch
from torch import nn

from lora_kernels.quantization import FrozenWeight, NotFrozen, find, frozen_weight
from lora_kernels.testing.tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_is(layer, own, *, n, k):
    """The layer's frozen weight is own [n, k], the library's dequantisation in its own dtype."""
    weight = frozen_weight(layer)
    assert isinstance(weight, FrozenWeight)
    assert weight.layer is layer
    assert weight.bias is layer.bias
    assert weight.shape == (n, k)
    assert type(weight.shape) is tuple
    assert torch.equal(weight.dense(own.dtype), own)
    assert_dense(weight)


def assert_dense(weight):
    """dense() gives a new plain matrix of any dtype, rounded once, and leaves the layer alone."""
    layer = weight.layer
    held = {name: id(p) for name, p in layer.named_parameters()}
    state = tensors(layer)
    w = weight.dense(torch.float32)
    for dtype in (*DTYPES, torch.float64):
        dense = weight.dense(dtype)
        assert type(dense) is torch.Tensor
        assert dense.dtype == dtype
        assert dense.device == weight.device
        assert dense.shape == weight.shape
        assert dense.is_contiguous()
        assert not dense.requires_grad
        if dtype == torch.float64:
            assert torch.equal(dense.float(), w)
        else:
            assert torch.equal(dense, w.to(dtype))
        dense.zero_()  # it is the caller's own
    assert torch.equal(weight.dense(torch.float32), w)
    assert {name: id(p) for name, p in layer.named_parameters()} == held
    assert tensors(layer) == state


def tensors(layer):
    """The bytes of all that a layer's state dict is made of. Making one has effects of its own."""
    found = {}
    for name, parameter in layer.named_parameters():
        inner = (*getattr(parameter, "tensor_data_names", ()), "_data", "_scale", "_shift")
        parts = {part: getattr(parameter, part) for part in inner if hasattr(parameter, part)}
        for part, tensor in (parts or {"": parameter.detach()}).items():
            plain = getattr(tensor, "_data", tensor).contiguous().view(-1)
            found[f"{name}.{part}"] = plain.view(torch.uint8).tolist()
    return found


def assert_product(layer, x):
    """assert_close of layer(x) to x·wᵀ + bias, w as layer multiplies by it."""
    weight = frozen_weight(layer)
    dtype = weight.product_dtype(x)
    with torch.no_grad():
        y = layer(x)
        bias = None if weight.bias is None else weight.bias.double()
        exact = nn.functional.linear(x.double(), weight.dense(torch.float64), bias)
        narrow = None if bias is None else bias.to(dtype)
        baseline = nn.functional.linear(x.to(dtype), weight.dense(dtype), narrow).to(y.dtype)
    assert_close(y, exact, baseline, weight.kind)


def assert_refused(layer, reason, error=ValueError):
    """It is no frozen weight; the message of the error names its class and the reason."""
    found = find(layer)
    assert isinstance(found, NotFrozen)
    assert found.error is error
    with pytest.raises(error, match=f"{type(layer).__name__} has no frozen weight: .*{reason}"):
        frozen_weight(layer)
