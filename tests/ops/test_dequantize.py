"""dense(): 4-bit weights by the kernel if there are kernels, anything else by its library."""

import pytest
import torch

from lora_kernels import frozen_weight
from lora_kernels.kernels.operands import random_four_bit
from lora_kernels.ops.dequantize import dense
from lora_kernels.reference.dequantize import dense_4bit
from tests.op_calls import Calls
from tests.quantized import KINDS, quantised

FOUR_BIT = [kind for kind in KINDS if kind.startswith(("nf4", "fp4"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_the_specification_has_the_bits_of_bitsandbytes(kind, dtype):
    frozen = frozen_weight(quantised(kind, 48, 72))
    assert torch.equal(dense_4bit(frozen.four_bit(), dtype), frozen.dense(dtype))


@pytest.mark.parametrize("algorithm", ["addmm", "reference"], indirect=True)
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_kernel_makes_it_dense_if_there_are_kernels(kind, algorithm):
    frozen = frozen_weight(quantised(kind, 48, 72))
    with Calls() as calls:
        made = dense(frozen, torch.float32)
    assert calls.names.count("dense_4bit") == (algorithm == "addmm")
    assert torch.equal(made, frozen.dense(torch.float32))


@pytest.mark.parametrize("algorithm", ["addmm"], indirect=True)
def test_what_has_no_kernel_is_made_by_its_library(algorithm):
    frozen = frozen_weight(quantised("torchao-int8", 48, 72))
    assert torch.equal(dense(frozen, torch.float32), frozen.dense(torch.float32))
    frozen = frozen_weight(quantised("nf4", 48, 72))
    assert dense(frozen, torch.float64).dtype == torch.float64


def test_opcheck(device):
    w = random_four_bit((5, 7), device)
    arguments = (*w[:4], *w.shape, torch.float32, *w.nested)
    torch.library.opcheck(torch.ops.lora_kernels.dense_4bit.default, arguments)
