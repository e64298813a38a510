"""shrink: h = x_hat · aᵀ."""

import pytest
import torch

from lora_kernels.kernels import formulas
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import check, dropout, dtypes, lying, operands, shapes, skinny


@dropout
@shapes
@dtypes
@skinny("shrink")
@lying
def test_shrink_is_its_formula(aligned, config, dtype, shape, dropout_p, seed, device):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned)
    check("shrink", o, config, h=torch.float32)


@dropout
@shapes
@skinny("shrink")
@lying
def test_terms_of_a_float32_factor(aligned, config, shape, dropout_p, terms, seed, device):
    o = operands(
        shape, torch.bfloat16, device, dropout_p=dropout_p, aligned=aligned,
        lora_dtype=torch.float32,
    )  # fmt: skip
    check("shrink", o, config, h=torch.float32)


@skinny("shrink")
@pytest.mark.parametrize("allow_tf32", [True], indirect=True)
def test_terms_are_as_precise_as_tf32_if_that_is_allowed(allow_tf32, config, terms, seed, device):
    o = operands((33, 65, 70, 17), torch.bfloat16, device, lora_dtype=torch.float32)
    (h,), (exact,) = LAUNCHERS["shrink"](o, config), formulas.shrink(o, torch.float64)
    o.a = (o.a.view(torch.int32) & -(1 << 13)).view(torch.float32)
    assert_close(h, exact, *formulas.shrink(o, torch.float32))


@skinny("shrink")
def test_terms_of_the_factors_of_layers(config, terms, seed, device):
    problem = operands(
        (33, 40, 40, 5), torch.bfloat16, device, dropout_p=0.3, lora_dtype=torch.float32
    ).problem
    o = Operands(problem, layers=3)
    o.a = torch.randn_like(o.a)
    (h,) = LAUNCHERS["shrink"](o, config)
    for layer, a in enumerate(o.a):
        one = Operands(problem)
        one.a = a
        exact, baseline = (formulas.shrink(one, dtype)[0] for dtype in (torch.float64, a.dtype))
        assert_close(h[layer], exact, baseline, f"layer {layer}")
