"""Linear4bit and Linear8bitLt against bitsandbytes' own dequantisation and forward."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn

from lora_kernels.quantization import find
from tests.quantization.dense import (
    DTYPES,
    assert_dense,
    assert_is,
    assert_product,
    assert_refused,
)
from tests.quantized import quantised

FOUR = ("nf4", "nf4-nested", "fp4", "fp4-nested")
SHAPES = ((64, 128), (48, 96), (33, 70), (7, 33))  # K even and odd, of whole blocks and not
four_bit = pytest.mark.parametrize("kind", FOUR)
nested = pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pack(layer):
    """What a forward in eval() does to the weight on a CPU with AVX512-BF16 instructions."""
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert layer.weight.quant_state.packing_format_for_cpu


@four_bit
@dtypes
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_four_bits(kind, dtype, n, k, device):
    layer = quantised(kind, n, k, dtype=dtype, device=device)
    own = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert own.dtype == dtype
    assert_is(layer, own, n=n, k=k)
    weight = find(layer)
    assert weight.exact
    assert weight.dtype == dtype
    assert weight.kind == kind[:3]


@four_bit
@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_four_bits_multiply(kind, dtype, bias, device, seed):
    layer = quantised(kind, 40, 72, bias=bias, dtype=dtype, device=device)
    assert_product(layer, torch.randn(3, 5, 72, dtype=dtype, device=device))


@nested
def test_dense_rounds_once_though_the_weight_was_in_bfloat16(kind):
    layer = quantised(kind, dtype=torch.bfloat16)
    layer.weight.quant_state.dtype = torch.float32
    own = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer.weight.quant_state.dtype = torch.bfloat16
    assert torch.equal(find(layer).dense(torch.float32), own)


@nested
@pytest.mark.parametrize("blocksize", [128, 4096])
def test_other_block_sizes(kind, blocksize):
    layer = bnb.nn.Linear4bit(96, 80, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(80, 96),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=kind == "nf4-nested",
        quant_type="nf4",
    )
    layer.to("cpu")
    state = layer.weight.quant_state
    assert state.blocksize == blocksize
    assert_is(layer, functional.dequantize_4bit(layer.weight.data, state), n=80, k=96)


def stored(kind, storage):
    """The layer quantised(kind, bias=False), its codes stored as numbers of that dtype."""
    torch.manual_seed(0)
    dense = nn.Linear(128, 64).weight.detach()
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        dense,
        requires_grad=False,
        compress_statistics=kind == "nf4-nested",
        quant_type="nf4",
        quant_storage=storage,
        module=layer,
    )
    layer.to("cpu")
    assert layer.weight.dtype == storage
    return layer


@nested
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_may_be_stored_as_numbers(kind, storage, seed):
    as_bytes, layer = quantised(kind), stored(kind, storage)
    assert_is(layer, find(as_bytes).dense(torch.float32), n=64, k=128)
    assert_product(layer, torch.randn(3, 128))
    pack(layer)
    assert torch.equal(find(layer).dense(torch.float32), packed_of(as_bytes))


def test_the_state_is_the_modules_if_the_weight_lost_it():
    layer = quantised("nf4-nested")
    expected = find(layer).dense(torch.float32)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP makes them
    assert_is(layer, expected, n=64, k=128)


def test_the_first_x_decides_in_which_dtype_a_layer_without_compute_dtype_multiplies():
    layer = quantised("nf4")
    layer.compute_dtype, layer.compute_type_is_set = None, False
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    assert find(layer).dtype is None
    assert find(layer).product_dtype(x) == torch.bfloat16
    layer(x)
    assert find(layer).dtype == torch.bfloat16


def packed_of(layer):
    """w with scales rounded to bfloat16, which is what packing does to it."""
    state = copy.deepcopy(layer.weight.quant_state)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    state.absmax, state.nested = scales.bfloat16().float(), False
    state.dtype = torch.float32
    return functional.dequantize_4bit(layer.weight.data, state)


@four_bit
@dtypes
def test_packed_weights_are_undone(kind, dtype):
    layer = quantised(kind, 96, 192, dtype=dtype)
    expected = packed_of(layer)
    pack(layer)
    weight = find(layer)
    assert weight.dtype == torch.bfloat16
    assert weight.shape == (96, 192)
    assert torch.equal(weight.dense(torch.float32), expected)
    assert_dense(weight)
    assert layer.weight.quant_state.packing_format_for_cpu


@four_bit
@pytest.mark.skipif(
    not functional.has_avx512bf16(), reason="bitsandbytes packs on CPUs with AVX512-BF16 alone"
)
def test_a_forward_in_eval_packs(kind, seed):
    layer = quantised(kind, 64, 128, dtype=torch.bfloat16).eval()
    expected = packed_of(layer)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert torch.equal(find(layer).dense(torch.float32), expected)
    assert_product(layer, x)
    assert_product(layer.train(), x)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@nested
def test_packed_weights_are_restored(kind, storage, seed):
    layer = stored(kind, storage)
    x, before = torch.randn(3, 128), layer.weight.data.view(torch.uint8).clone()
    pack(layer)
    packed = find(layer).dense(torch.float32)
    find(layer).restore()
    assert not layer.weight.quant_state.packing_format_for_cpu
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.data.view(torch.uint8), before)
    assert torch.equal(find(layer).dense(torch.float32), packed)
    assert_product(layer, x)
    layer.state_dict()
    assert torch.equal(find(layer).dense(torch.float32), packed)
    pack(layer)  # loses nothing any more
    assert torch.equal(find(layer).dense(torch.float32), packed)


def test_bitsandbytes_own_unpacking_is_noticed():
    layer = quantised("nf4")
    pack(layer)
    layer.state_dict()  # which unpacks, but not the scales
    assert_refused(layer, "lost the order of its scales .* load it again")
    twice = quantised("nf4-nested")
    before = find(twice).dense(torch.float32)
    pack(twice)
    twice.state_dict()  # which quantises the scales again
    assert find(twice).dtype == torch.float32
    torch.testing.assert_close(find(twice).dense(torch.float32), before, rtol=0.02, atol=0.02)


@dtypes
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("called", [False, True])
def test_eight_bits(dtype, n, k, called, device, seed):
    layer = quantised("int8", n, k, bias=False, dtype=dtype)
    own = copy.deepcopy(layer)(torch.eye(k, dtype=dtype)).T  # w by itself: other terms are zero
    layer, own = layer.to(device), own.to(device)
    if called:
        layer(torch.randn(2, k, dtype=dtype, device=device))  # which moves codes and scales
        assert layer.weight.CB is None
    assert_is(layer, own, n=n, k=k)
    assert find(layer).dtype is None
    assert find(layer).kind == "int8"


@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_multiply(dtype, bias, seed):
    layer = quantised("int8", 40, 72, bias=bias, dtype=dtype)
    assert find(layer).exact
    assert_product(layer, torch.randn(3, 5, 72, dtype=dtype))


def test_eight_bits_are_not_exact_in_eval(seed):
    layer = quantised("int8").eval()
    assert not find(layer).exact
    with pytest.raises(AssertionError, match="error"):
        assert_product(layer, torch.randn(5, 128))


def test_eight_bits_with_outliers(seed):
    layer = quantised("int8", dtype=torch.float16)
    layer.state.threshold = 6.0
    x = torch.randn(5, 128, dtype=torch.float16)
    x[:, 3] = 40
    assert find(layer).exact
    assert_product(layer, x)
    assert not find(layer.eval()).exact


@nested
def test_trained_weights_are_refused(kind):
    layer = stored(kind, torch.bfloat16)  # bytes cannot require grad
    layer.weight.requires_grad_(True)
    assert_refused(layer, r"requires grad: freeze it with weight.requires_grad_\(False\)")


def test_weights_that_are_not_quantised_yet_are_refused():
    assert_refused(bnb.nn.Linear4bit(64, 32), "no quant_state: move it to its device")
    assert_refused(bnb.nn.LinearNF4(64, 32), "no quant_state: move it to its device")
    fresh = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    assert_refused(fresh, "not quantised yet: move it to its device")


def test_named_types_are_taken():
    for kind in (bnb.nn.LinearNF4, bnb.nn.LinearFP4):
        layer = kind(64, 32, compute_dtype=torch.float32).to("cpu")
        own = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert_is(layer, own, n=32, k=64)


def test_weights_in_the_deprecated_orientation_are_refused():
    layer = quantised("nf4", 64, 128)
    layer.in_features, layer.out_features = 64, 128
    assert_refused(layer, r"quantised as \[64, 128\], not as .* \[128, 64\]: quantise it again")


def test_layers_that_quantise_in_every_forward_are_refused():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu")
    assert_refused(layer, "has_fp16_weights=True .* has_fp16_weights=False")


def test_layers_without_scales_are_refused():
    layer = quantised("int8")
    layer.weight.SCB = None
    assert_refused(layer, "no scales .* load it again")


def test_layers_without_a_weight_are_refused():
    for kind in ("nf4", "int8"):
        layer = quantised(kind)
        del layer.weight
        assert_refused(layer, "no parameter weight")
