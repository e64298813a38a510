"""dequantize: 4-bit weights, statistics plain and nested, to the bits that bitsandbytes makes."""

import os
import subprocess
import sys

import pytest
import torch

from lora_kernels.kernels.config import SkinnyConfig
from lora_kernels.kernels.dequantize import dequantize_4bit
from lora_kernels.kernels.operands import random_four_bit
from lora_kernels.reference.dequantize import dense_4bit
from lora_kernels.testing.memory import guarded_outputs
from tests.kernels.cases import check, operands, skinny

pytestmark = pytest.mark.usefixtures("rounded_bfloat16")

# One weight; an odd number of them; rows across blocks; a last block that is short; several blocks
# of statistics.
SHAPES = [(1, 1), (5, 7), (8, 48), (3, 50), (64, 64), (130, 129)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
statistics = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])


def weight(shape, device, nested=True, blocksize=64):
    w = random_four_bit(shape, device, blocksize)
    # No sum is exact, so the order of roundings can be told.
    numbers = [torch.randn(t.shape, device=device) for t in (w.code, *w.nested[:2])]
    w = w._replace(code=numbers[0])
    if not nested:
        return w._replace(absmax=torch.rand(w.absmax.shape, device=device), nested=None)
    return w._replace(nested=(numbers[1], numbers[2], 256, torch.randn((), device=device)))


def same_bits(w, dtype, config=None):
    with guarded_outputs():
        out = dequantize_4bit(*w[:5], dtype, w.nested, config)
    assert out.shape == w.shape
    return torch.equal(out, dense_4bit(w, dtype))


@dtypes
@skinny("dequantize")
def test_a_dense_weight_is_its_formula(config, dtype, seed, device):
    check("dequantize_4bit", operands((1, 50, 70, 1), dtype, device), config, w=dtype)


@shapes
@dtypes
@statistics
def test_every_step_is_rounded_in_float32_and_the_weight_once(nested, dtype, shape, seed, device):
    assert same_bits(weight(shape, device, nested), dtype)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@statistics
def test_blocks_of_any_size(nested, blocksize, seed, device):
    for config in (None, SkinnyConfig(16, 16, 4, 1), SkinnyConfig(32, 256, 4, 1)):
        assert same_bits(weight((97, 99), device, nested, blocksize), torch.float32, config)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 50), (66, 256)], ids=str)
@dtypes
@statistics
def test_the_bits_are_those_of_bitsandbytes(nested, dtype, shape, kind, seed, device):
    functional = pytest.importorskip("bitsandbytes").functional
    w = torch.randn(shape, device=device)
    packed, state = functional.quantize_4bit(w, compress_statistics=nested, quant_type=kind)
    absmax, statistics, second = state.absmax, None, state.state2
    if nested:
        statistics = (second.absmax, second.code, second.blocksize, state.offset)
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, second.absmax, second.code, second.blocksize, torch.float32
        )
        absmax += state.offset
    expected = torch.ops.bitsandbytes.dequantize_4bit(
        packed, absmax, state.blocksize, kind, shape, dtype
    )
    arguments = (packed, state.absmax, state.code, state.blocksize, shape, dtype, statistics)
    assert torch.equal(dequantize_4bit(*arguments), expected)


CONTRACTED = """
import re, sys
import torch
from lora_kernels.kernels.registry import KERNELS, LAUNCHERS
from tests.kernels import aot, gate

with aot.compiling_for(sys.argv[1]):
    LAUNCHERS["dequantize_4bit"](gate.operands(gate.Case()))
    (compiled,) = KERNELS["dequantize"].function.device_caches[0][0].values()
code = compiled.asm["amdgcn" if sys.argv[1].startswith("gfx") else "ptx"]
assert re.search(r"v_(pk_)?add_f32|add\\.\\w*\\.?f32", code), code
found = re.findall(r"(?:v_(?:pk_)?(?:fma|mad|mac)|\\bfma)\\S*", code)
assert not found, found
"""


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_product_and_sum_are_rounded_as_one(target):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CONTRACTED, target], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FAR = """
import torch
from lora_kernels.kernels import dequantize
from lora_kernels.kernels.operands import random_four_bit
from lora_kernels.reference.dequantize import dense_4bit

device = "cuda" if torch.cuda.is_available() else "cpu"
start, rows = 2**31 // 64, 64  # where the rows that are looked at begin
shape = (start + rows, 64)
size = shape[0] * shape[1]
last = random_four_bit((rows, 64), device)

def behind(values, count):
    whole = torch.empty(count, dtype=values.dtype, device=device)  # no memory before it is written
    whole[-len(values) :] = values
    return whole

packed, absmax = behind(last.packed, size // 2), behind(last.absmax, size // 64)
absmax2 = behind(last.nested[0], size // 64 // 256 + 1)
if device == "cpu":  # the interpreter would take an hour for all programs, so it runs the last
    from triton.runtime.interpreter import interpreter_builder as builder, TensorHandle

    near = builder.create_get_program_id
    def far(axis):
        program = near(axis)
        return TensorHandle(program.data + size // 4096 - 1, program.dtype)
    builder.create_get_program_id = far
    launch = dequantize.launch
    dequantize.launch = lambda kernel, grid, **options: launch(kernel, (1,), **options)
nested = (absmax2, *last.nested[1:])
out = dequantize.dequantize_4bit(packed, absmax, last.code, 64, shape, torch.float16, nested)
assert torch.equal(out[start:], dense_4bit(last, torch.float16))
"""


def test_weights_beyond_2_to_the_31():
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
