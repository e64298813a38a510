"""QLinear against quanto's own dequantisation and forward."""

import pytest
import torch
from torch import nn

from lora_kernels.quantization import find
from tests.quantization.dense import DTYPES, assert_is, assert_product, assert_refused
from tests.quantized import KINDS, quantised

quanto = pytest.importorskip("optimum.quanto")

kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("quanto-")])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@kinds
@dtypes
@pytest.mark.parametrize(("n", "k"), [(64, 128), (96, 256), (33, 70)])  # 256: of other kernels
@pytest.mark.parametrize("bias", [True, False])
def test_dense_and_product(kind, dtype, n, k, bias, seed):
    layer = quantised(kind, n, k, bias=bias, dtype=dtype)
    assert_is(layer, layer.weight.dequantize(), n=n, k=k)
    weight = find(layer)
    assert weight.exact
    assert weight.dtype == dtype
    assert weight.kind.startswith(f"q{kind.partition('-')[2]}")
    assert_product(layer, torch.randn(3, 5, k, dtype=dtype))


def test_two_bits(seed):
    model = nn.Sequential(nn.Linear(96, 48)).requires_grad_(False)
    quanto.quantize(model, weights=quanto.qint2)
    quanto.freeze(model)
    model.requires_grad_(False)
    assert_is(model[0], model[0].weight.dequantize(), n=48, k=96)
    assert_product(model[0], torch.randn(5, 96))


def test_quanto_makes_weights_trainable_which_are_refused():
    model = nn.Sequential(nn.Linear(96, 48)).requires_grad_(False)
    quanto.quantize(model, weights=quanto.qint8)
    assert_refused(model[0], r"not quantised yet: call optimum.quanto.freeze\(model\)")
    quanto.freeze(model)
    assert_refused(model[0], "requires grad: freeze it")


def test_quantised_activations_are_refused():
    model = nn.Sequential(nn.Linear(96, 48))
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    quanto.freeze(model)
    assert_refused(model[0].requires_grad_(False), "quantises its activations: quantise the wei")
