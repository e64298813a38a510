"""FP8Linear of transformers: dense() against a loop over its blocks. Its forward needs a GPU."""

import pytest
import torch
from torch import nn
from transformers.integrations import finegrained_fp8

from lora_kernels.quantization import find
from tests.quantization.dense import assert_is, assert_refused


def fp8(n, k, block_size, *, bias=False, scale_fmt="float"):
    layer = finegrained_fp8.FP8Linear(k, n, block_size, has_bias=bias, scale_fmt=scale_fmt)
    layer.requires_grad_(False)
    layer.weight.copy_(torch.randn(n, k) * 30)
    layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape) + 0.5)
    return layer


def block_by_block(layer):
    n, k = layer.weight.shape
    height, width = layer.block_size or (n, k)
    scales = layer.weight_scale_inv.float().view(-(-n // height), -(-k // width))
    w = layer.weight.float()
    for row in range(n):
        for column in range(k):
            w[row, column] *= scales[row // height, column // width]
    return w


@pytest.mark.parametrize("block_size", [None, (4, 8), (8, 4), (16, 16), (128, 128), (1, 8)])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (13, 21)])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_dense(block_size, n, k, scale_fmt, seed):
    layer = fp8(n, k, block_size, scale_fmt=scale_fmt)
    assert_is(layer, block_by_block(layer), n=n, k=k)
    weight = find(layer)
    assert not weight.exact
    assert weight.dtype is None
    assert weight.kind == "float8"


def test_dense_is_what_transformers_own_backward_multiplies_by(monkeypatch, seed):
    layer = fp8(16, 32, (4, 8), bias=True)
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", lambda x, *_: x.new_zeros(len(x), 16))
    x = torch.randn(5, 32, requires_grad=True)
    layer(x).backward(torch.eye(16)[:5])
    assert torch.equal(x.grad, find(layer).dense(torch.float32)[:5])


def test_layers_that_do_not_fit_are_refused():
    layer = finegrained_fp8.FP8Linear(32, 16, (4, 8))
    assert_refused(layer, "requires grad: freeze it")
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    assert_refused(layer, "packed FP4")
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.bfloat16), requires_grad=False)
    assert_refused(layer, "dense: pass the weight itself", TypeError)
