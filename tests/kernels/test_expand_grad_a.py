"""expand_grad_a: mask ∘ (dh · a) and dhᵀ · x_hat in one pass over x."""

import pytest
import torch

from lora_kernels.kernels import expand_grad_a
from lora_kernels.kernels.numerics import numerics_of
from tests.kernels.cases import (
    SHAPES,
    check,
    dropout,
    dtypes,
    lying,
    operands,
    skinny,
)

META, F32, F16, BF16 = torch.device("meta"), torch.float32, torch.float16, torch.bfloat16


@dropout
@pytest.mark.parametrize("shape", [(m, k, n, min(r, 32)) for m, k, n, r in SHAPES], ids=str)
@dtypes
@skinny("expand_grad_a")
@lying
def test_expand_grad_a_is_its_formula(aligned, config, dtype, shape, dropout_p, seed, device):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned)
    check("expand_grad_a", o, config, dx=dtype, da=dtype)


@dropout
@pytest.mark.parametrize("shape", [(5, 7, 11, 3), (33, 65, 70, 17), (97, 96, 40, 32)], ids=str)
@skinny("expand_grad_a")
def test_terms_of_float32_dh(config, shape, dropout_p, terms, seed, device):
    o = operands(shape, BF16, device, dropout_p=dropout_p, lora_dtype=F32)
    check("expand_grad_a", o, config, dx=BF16, da=F32)


@pytest.mark.parametrize(
    ("dtype", "lora", "r", "expected"),
    [
        (BF16, BF16, 64, True), (BF16, BF16, 65, False),
        (BF16, F32, 64, True), (BF16, F32, 65, False),
        (F16, F16, 64, True), (F16, F16, 65, False), (F32, F32, 32, True), (F32, F32, 33, False),
    ],
    ids=str,
)  # fmt: skip
def test_expand_grad_a_supports_ranks_of_one_block(hopper, dtype, lora, r, expected):
    dy, a = torch.empty(8, 8, dtype=dtype, device=META), torch.empty(r, 8, dtype=lora, device=META)
    assert expand_grad_a.supports(r, numerics_of(dy, a), META) == expected
