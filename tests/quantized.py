"""Small quantised layers of every kind: quantised("nf4", n, k) is a layer [.., k] -> [.., n]."""

import pytest
import torch
from torch import nn

__all__ = ["INEXACT", "KINDS", "quantised"]


def quantised(kind, n=64, k=128, *, bias=True, dtype=torch.float32, device="cpu", seed=0):
    """A frozen layer of one of KINDS, in training mode; the test is skipped without hqq or quanto.

    dtype: of the weight that is quantised, of the bias, and of what the layer multiplies in. The
    same seed gives the same layer, and torch's own state of random numbers stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)
        layer = _MAKERS[kind](dense)
    return layer.to(device).requires_grad_(False)


def _bitsandbytes_4bit(quant_type: str, nested: bool, storage: torch.dtype = torch.uint8):
    """storage: in which dtype pairs of codes lie, for FSDP."""

    def make(dense: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        n, k = dense.weight.shape
        options = {
            "compress_statistics": nested,
            "quant_type": quant_type,
            "quant_storage": storage,
        }
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dense.weight.dtype, **options)
        layer.weight = bnb.nn.Params4bit(
            dense.weight.detach(), requires_grad=False, module=layer, **options
        )
        layer.bias = dense.bias
        return layer.to("cpu")  # which quantises it

    return make


def _bitsandbytes_8bit(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    n, k = dense.weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense.weight.detach(), requires_grad=False)
    layer.bias = dense.bias
    return layer.to("cpu")  # which quantises it


def _torchao(config: str, **options):
    def make(dense: nn.Linear) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(dense, getattr(quantization, config)(**options))
        return dense

    return make


def _hqq(nbits: int):
    def make(dense: nn.Linear) -> nn.Module:
        hqq = pytest.importorskip("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=nbits, group_size=32)
        return hqq.HQQLinear(dense, config, compute_dtype=dense.weight.dtype, device="cpu")

    return make


def _quanto(qtype: str):
    def make(dense: nn.Linear) -> nn.Module:
        quanto = pytest.importorskip("optimum.quanto")
        model = nn.Sequential(dense)
        quanto.quantize(model, weights=getattr(quanto, qtype))
        quanto.freeze(model)
        return model[0]

    return make


def _compressed_float8(dense: nn.Linear) -> nn.Module:
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    n, k = dense.weight.shape
    layer = CompressedTensorsFP8Linear(k, n)
    weight = dense.weight.detach().float()
    scales = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    layer.weight = nn.Parameter((weight / scales).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = nn.Parameter(scales.T.contiguous(), requires_grad=False)
    layer.bias = dense.bias
    return layer


_MAKERS = {
    "nf4": _bitsandbytes_4bit("nf4", nested=False),
    "nf4-nested": _bitsandbytes_4bit("nf4", nested=True),
    "nf4-float32": _bitsandbytes_4bit("nf4", nested=True, storage=torch.float32),
    "fp4": _bitsandbytes_4bit("fp4", nested=False),
    "fp4-nested": _bitsandbytes_4bit("fp4", nested=True),
    "int8": _bitsandbytes_8bit,
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
    "torchao-intx4": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-intx-dynamic": _torchao("Int8DynamicActivationIntxWeightConfig"),
    "hqq-4": _hqq(4),
    "hqq-8": _hqq(8),
    "quanto-int8": _quanto("qint8"),
    "quanto-int4": _quanto("qint4"),
    "quanto-float8": _quanto("qfloat8"),
    "compressed-float8": _compressed_float8,
}
KINDS = tuple(_MAKERS)
# Of these the layer does more than round x·wᵀ: it quantises x as well.
INEXACT = ("torchao-int8-dynamic", "torchao-intx-dynamic", "compressed-float8")
