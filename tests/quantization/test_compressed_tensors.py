"""Layers of compressed-tensors as transformers makes them."""

import pytest
import torch
from torch import nn

from lora_kernels.quantization import find
from tests.quantization.dense import DTYPES, assert_is, assert_product, assert_refused
from tests.quantized import quantised


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (33, 70)])
def test_float8(dtype, n, k, seed):
    layer = quantised("compressed-float8", n, k, dtype=dtype)
    own = layer.weight.float() * layer.weight_scale.T
    assert_is(layer, own, n=n, k=k)
    weight = find(layer)
    assert not weight.exact
    assert weight.dtype is None
    assert layer(torch.randn(3, k, dtype=dtype)).dtype == dtype


def test_float8_rounds_x(seed):
    layer = quantised("compressed-float8")
    with pytest.raises(AssertionError, match="error"):
        assert_product(layer, torch.randn(5, 128))
    whole = torch.randint(-7, 8, (5, 128)).float()
    whole[:, 0] = 448  # the scale is one then, and rounding changes nothing
    assert_product(layer, whole)


def test_trained_weights_are_refused():
    layer = quantised("compressed-float8")
    layer.weight = nn.Parameter(layer.weight)
    assert_refused(layer, "requires grad: freeze it")


def test_layers_that_decompress_themselves_are_refused():
    compressed = pytest.importorskip("compressed_tensors.quantization")
    config = compressed.QuantizationConfig(
        config_groups={
            "all": compressed.QuantizationScheme(
                targets=["Linear"], weights=compressed.QuantizationArgs(num_bits=8)
            )
        }
    )
    model = nn.Sequential(nn.Linear(64, 32))
    compressed.apply_quantization_config(model, config)
    assert_refused(model[0], "compressed-tensors patched it: load the model with dequantize=True")
