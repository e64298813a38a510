"""grouped_expand: y += scale_g · h · b_gᵀ + bias_e and dx += mask ∘ (dh · a_g), by segments."""

import pytest

from lora_kernels.kernels import formulas, grouped_launchers
from tests.kernels.cases import dtypes
from tests.kernels.grouped_cases import (
    check,
    dropout,
    operands,
    routings,
    small,
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@routings
@dtypes
@small("grouped_expand")
def test_y_is_its_formula(config, dtype, routing, bias, seed, device):
    o = operands(routing, dtype, device, bias=bias, aligned=routing == "gathered")
    check(grouped_launchers.expand_y, formulas.grouped_expand_y, o, dtype, config)


@dropout
@routings
@dtypes
@small("grouped_expand")
def test_dx_is_its_formula(config, dtype, routing, dropout_p, seed, device):
    o = operands(routing, dtype, device, dropout_p, aligned=routing == "gathered")
    check(grouped_launchers.expand_dx, formulas.grouped_expand_dx, o, dtype, config)


@pytest.mark.parametrize("routing", ["several of a group", "experts"])
@dtypes
def test_the_tables_tiles(dtype, routing, seed, device):
    o = operands(routing, dtype, device, 0.3)
    check(grouped_launchers.expand_y, formulas.grouped_expand_y, o, dtype, None)
    check(grouped_launchers.expand_dx, formulas.grouped_expand_dx, o, dtype, None)
