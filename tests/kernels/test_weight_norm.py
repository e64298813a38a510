"""weight_norm: the norms of the rows of w + scaling·b·a."""

import pytest
import torch

from lora_kernels.kernels.numerics import numerics_of
from tests.kernels.cases import check, dtypes, operands, shapes, skinny


@shapes
@dtypes
@skinny("weight_norm")
@pytest.mark.parametrize("transposed", [False, True], ids=["aligned NK", "unaligned KN"])
def test_weight_norm_is_its_formula(transposed, config, dtype, shape, seed, device):
    o = operands(shape, dtype, device, aligned=not transposed, transposed=transposed)
    check("weight_norm", o, config, norm=torch.float32)


@shapes
@skinny("weight_norm")
@pytest.mark.parametrize("transposed", [False, True], ids=["aligned NK", "unaligned KN"])
def test_terms_of_float32_factors(transposed, config, shape, seed, device):
    o = operands(
        shape, torch.bfloat16, device, aligned=not transposed, transposed=transposed,
        lora_dtype=torch.float32,
    )  # fmt: skip
    check("weight_norm", o, config, norm=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "a_dtype", "b_dtype"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_factors_of_any_dtype_are_rounded_by_nothing(dtype, a_dtype, b_dtype, seed, device):
    o = operands((1, 70, 130, 5), torch.float32, device)
    o.w, o.a, o.b = o.w.to(dtype), o.a.to(a_dtype), o.b.to(b_dtype)
    o.numerics = numerics_of(o.w, o.a, o.b)
    check("weight_norm", o, None, norm=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_nearly_cancel_keep_their_digits(dtype, seed, device):
    o = operands((1, 70, 65, 5), dtype, device, lora_dtype=torch.float32)
    update = o.spec.scaling * o.b.double() @ o.a.double()
    o.w = (1e-3 * torch.randn_like(update) - update).to(dtype)
    check("weight_norm", o, None, norm=torch.float32)


def test_the_norm_of_a_row_of_zeros_is_zero(seed, device):
    o = operands((1, 40, 20, 3), torch.float16, device)
    o.w[7], o.b[7] = 0, 0
    check("weight_norm", o, None, norm=torch.float32)
