"""grouped_shrink: h = scale_g · x_hat · a_gᵀ and dh = scale_g · dy · b_g, by segments."""

import pytest
import torch

from lora_kernels.kernels import formulas, grouped_launchers
from tests.kernels.cases import dtypes
from tests.kernels.grouped_cases import (
    check,
    dropout,
    operands,
    routings,
    small,
)


@dropout
@routings
@dtypes
@small("grouped_shrink")
def test_h_is_its_formula(config, dtype, routing, dropout_p, seed, device):
    o = operands(routing, dtype, device, dropout_p, aligned=routing == "gathered", product=False)
    check(grouped_launchers.shrink_h, formulas.grouped_shrink_h, o, torch.float32, config)


@routings
@dtypes
@small("grouped_shrink")
def test_dh_is_its_formula(config, dtype, routing, seed, device):
    o = operands(routing, dtype, device, 0.3, aligned=routing == "gathered", product=False)
    check(grouped_launchers.shrink_dh, formulas.grouped_shrink_dh, o, o.numerics.dh, config)


@dropout
@routings
@small("grouped_shrink")
def test_terms_of_float32_factors(config, routing, dropout_p, terms, seed, device):
    aligned = routing == "gathered"
    o = operands(
        routing, torch.bfloat16, device, dropout_p, aligned, product=False, lora_dtype=torch.float32
    )
    check(grouped_launchers.shrink_h, formulas.grouped_shrink_h, o, torch.float32, config)
    check(grouped_launchers.shrink_dh, formulas.grouped_shrink_dh, o, torch.float32, config)


def test_a_factor_that_serves_every_group_has_terms(terms, seed, device):
    o = operands("several of a group", torch.bfloat16, device, 0.3, lora_dtype=torch.float32)
    o.a = o.a[:1].expand(2, -1, -1)
    check(grouped_launchers.shrink_h, formulas.grouped_shrink_h, o, torch.float32, None)


@pytest.mark.parametrize("routing", ["several of a group", "experts"])
@dtypes
def test_the_tables_tiles(dtype, routing, seed, device):
    o = operands(routing, dtype, device, 0.3)
    check(grouped_launchers.shrink_h, formulas.grouped_shrink_h, o, torch.float32, None)
    check(grouped_launchers.shrink_dh, formulas.grouped_shrink_dh, o, o.numerics.dh, None)
