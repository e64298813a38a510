"""expand: scaling · h · bᵀ + bias, and mask ∘ (dh · a)."""

import pytest

from tests.kernels.cases import (
    check,
    dropout,
    dtypes,
    linear_and_merged,
    operands,
    shapes,
    skinny,
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@linear_and_merged
@shapes
@dtypes
@skinny("expand")
def test_expand_y_is_its_formula(config, dtype, shape, groups, bias, seed, device):
    o = operands(shape, dtype, device, groups=groups, bias=bias)
    check("expand_y", o, config, y=dtype)


@dropout
@shapes
@dtypes
@skinny("expand")
def test_expand_dx_is_its_formula(config, dtype, shape, dropout_p, seed, device):
    check("expand_dx", operands(shape, dtype, device, dropout_p=dropout_p), config, dx=dtype)
