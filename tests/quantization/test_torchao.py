"""nn.Linear with a weight of torchao against torchao's own dequantisation and forward."""

import pytest
import torch
from torch import nn
from torchao import quantization
from torchao.prototype import mx_formats
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import granularity

from lora_kernels.quantization import find
from tests.quantization.dense import DTYPES, assert_is, assert_product, assert_refused
from tests.quantized import INEXACT, KINDS, quantised
from tests.tensor_classes import Halves

kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("torchao-")])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@kinds
@dtypes
@pytest.mark.parametrize(("n", "k"), [(64, 128), (33, 96)])
def test_dense(kind, dtype, n, k, device):
    layer = quantised(kind, n, k, dtype=dtype, device=device)
    assert_is(layer, layer.weight.dequantize(), n=n, k=k)


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-float8", "torchao-intx4"])
def test_odd_shapes(kind):
    layer = quantised(kind, 7, 33)
    assert_is(layer, layer.weight.dequantize(), n=7, k=33)


@kinds
@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_product(kind, dtype, bias, seed):
    layer = quantised(kind, 48, 96, bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 96, dtype=dtype)
    assert find(layer).exact == (kind not in INEXACT)
    assert find(layer).product_dtype(x) == dtype
    if find(layer).exact:
        assert_product(layer, x)
    elif dtype == torch.float32:
        with pytest.raises(AssertionError, match="error"):
            assert_product(layer, x)


@dtypes
def test_int8_multiplies_in_the_dtype_of_x(dtype, seed):
    layer = quantised("torchao-int8", bias=False, dtype=torch.bfloat16)
    x = torch.randn(4, 128, dtype=dtype)
    assert find(layer).product_dtype(x) == dtype
    assert layer(x).dtype == dtype
    assert_product(layer, x)


@pytest.mark.parametrize(
    "of", [granularity.PerTensor(), granularity.PerRow(), granularity.PerGroup(32)], ids=str
)
def test_granularities(of, seed):
    layer = nn.Linear(96, 48).requires_grad_(False)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(granularity=of))
    assert_is(layer, layer.weight.dequantize(), n=48, k=96)
    assert_product(layer, torch.randn(5, 96))


def test_nvfp4(seed):
    layer = nn.Linear(96, 48).requires_grad_(False)
    quantization.quantize_(layer, mx_formats.NVFP4WeightOnlyConfig())
    assert_is(layer, layer.weight.dequantize(), n=48, k=96)
    assert find(layer).kind == "nvfp4"
    assert_product(layer, torch.randn(5, 96))


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-float8"])
def test_weights_that_quantise_x_are_not_exact(kind):
    layer = quantised(kind)
    assert find(layer).exact
    layer.weight.act_quant_kwargs = object()  # of the configurations that need a GPU, too
    assert not find(layer).exact


def test_dense_weights_are_refused():
    reason = "its weight is dense: pass the weight itself"
    assert_refused(nn.Linear(3, 2), reason, TypeError)
    replica = nn.Linear(3, 2)
    weight = replica.weight.detach()
    del replica._parameters["weight"]
    replica._parameters["weight"] = weight  # as fully_shard and torch.func put it there
    assert_refused(replica, reason, TypeError)


def test_trained_weights_are_refused():
    layer = quantised("torchao-int8")
    layer.weight = nn.Parameter(layer.weight)
    assert_refused(layer, "requires grad: freeze it")


def test_weights_that_scale_x_are_refused():
    layer = quantised("torchao-int8")
    layer.weight.act_pre_scale = torch.ones(128)
    assert_refused(layer, "act_pre_scale.* quantise it without")


def test_other_tensors_are_refused():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(Halves(layer.weight), requires_grad=False)
    assert_refused(layer, "a tests.tensor_classes.Halves; known are Int8Tensor, ", TypeError)
    layer = nn.Linear(64, 32)
    weight = MXTensor.to_mx(layer.weight.detach(), torch.float8_e4m3fn, 32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert_refused(layer, "MXTensor; known are Int8Tensor, ", TypeError)
    layer.weight = None
    assert_refused(layer, "NoneType", TypeError)
