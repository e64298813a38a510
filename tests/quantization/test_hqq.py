"""HQQLinear against HQQ's own dequantisation and forward."""

import pytest
import torch
from torch import nn

from lora_kernels.quantization import find
from tests.quantization.dense import DTYPES, assert_is, assert_product, assert_refused
from tests.quantized import quantised

hqq = pytest.importorskip("hqq.core.quantize")

bits = pytest.mark.parametrize("kind", ["hqq-4", "hqq-8"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@bits
@dtypes
@pytest.mark.parametrize(("n", "k"), [(64, 128), (34, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_and_product(kind, dtype, n, k, bias, seed):
    layer = quantised(kind, n, k, bias=bias, dtype=dtype)
    assert_is(layer, layer.dequantize(), n=n, k=k)
    weight = find(layer)
    assert weight.exact
    assert weight.dtype == dtype
    assert weight.kind == f"hqq, {kind[-1]} bits"
    assert_product(layer, torch.randn(3, 5, k, dtype=dtype))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("view_as_float", [False, True])
def test_every_packing(nbits, axis, view_as_float, seed):
    config = hqq.BaseQuantizeConfig(
        nbits=nbits, group_size=32, axis=axis, view_as_float=view_as_float
    )
    layer = hqq.HQQLinear(nn.Linear(96, 64), config, compute_dtype=torch.float32, device="cpu")
    assert_is(layer, layer.dequantize(), n=64, k=96)
    assert_product(layer, torch.randn(5, 96))


def test_dense_leaves_the_meta_alone():
    layer = quantised("hqq-4")
    layer.meta["zero_scale"] = torch.stack((layer.meta.pop("zero"), layer.meta.pop("scale")))
    own = layer.dequantize()

    class Guarded(dict):
        def __setitem__(self, key, value):
            raise AssertionError(f"{key} was written")

    layer.meta = Guarded(layer.meta)
    assert_is(layer, own, n=64, k=128)


@pytest.mark.parametrize("backend", ["PYTORCH_FORWARD", "PYTORCH_BACKPROP"])
def test_backends_of_pytorch_are_taken(backend, seed):
    layer = quantised("hqq-4")
    before = hqq.HQQLinear.backend
    try:
        hqq.HQQLinear.set_backend(hqq.HQQBackend[backend])
        assert_product(layer, torch.randn(5, 128))
    finally:
        hqq.HQQLinear.set_backend(before)


def test_other_backends_are_refused(monkeypatch):
    layer = quantised("hqq-4")
    monkeypatch.setattr(hqq.HQQLinear, "forward", hqq.HQQLinear.forward_aten)
    assert_refused(layer, "its backend is forward_aten: HQQLinear.set_backend")


def test_layers_that_are_not_quantised_yet_are_refused():
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    layer = hqq.HQQLinear(nn.Linear(96, 64), config, device="cpu", initialize=False)
    assert_refused(layer, "not quantised yet: call its initialize")
