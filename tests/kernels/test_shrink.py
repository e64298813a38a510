"""shrink: h = x_hat · aᵀ."""

import torch

from tests.kernels.cases import check, dropout, dtypes, lying, operands, shapes, skinny


@dropout
@shapes
@dtypes
@skinny("shrink")
@lying
def test_shrink_is_its_formula(aligned, config, dtype, shape, dropout_p, seed, device):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned)
    check("shrink", o, config, h=torch.float32)
