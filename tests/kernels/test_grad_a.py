"""grad_a: da = dhᵀ · x_hat."""

import torch

from lora_kernels.kernels import formulas
from lora_kernels.kernels.grad_a import grad_a
from lora_kernels.kernels.operands import Operands
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import check, dropout, dtypes, lying, operands, shapes, skinny


@dropout
@shapes
@dtypes
@skinny("grad_a")
@lying
def test_grad_a_is_its_formula(aligned, config, dtype, shape, dropout_p, seed, device):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned)
    check("grad_a", o, config, da=dtype)


@dropout
@shapes
@skinny("grad_a")
def test_terms_of_float32_dh(config, shape, dropout_p, terms, seed, device):
    o = operands(shape, torch.bfloat16, device, dropout_p=dropout_p, lora_dtype=torch.float32)
    check("grad_a", o, config, da=torch.float32)


@skinny("grad_a")
def test_terms_of_dh_of_layers(config, terms, seed, device):
    problem = operands(
        (33, 40, 40, 5), torch.bfloat16, device, dropout_p=0.3, lora_dtype=torch.float32
    ).problem
    o = Operands(problem, layers=3)
    o.dh = torch.randn_like(o.dh)
    da = grad_a(o.dh, o.x, o.seed, 0.3, torch.float32, o.numerics, config)
    for layer, dh in enumerate(o.dh):
        one = Operands(problem)
        one.dh = dh
        exact, baseline = (formulas.grad_a(one, d)[0] for d in (torch.float64, torch.float32))
        assert_close(da[layer], exact, baseline, f"layer {layer}")
