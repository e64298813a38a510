"""grouped_grad: da and dbᵀ by chunks of rows of one group."""

import pytest
import torch

from lora_kernels.kernels import formulas, grouped_grad, grouped_launchers
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import dtypes
from tests.kernels.grouped_cases import (
    check,
    dropout,
    operands,
    routings,
    scratch_of_nan,
    small,
)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of so few rows that a segment takes two, and that a chunk takes two tiles."""
    monkeypatch.setattr(grouped_grad, "CHUNK", 17)


@dropout
@routings
@dtypes
@small("grouped_grad")
def test_da_is_its_formula(config, dtype, routing, dropout_p, short_chunks, seed, device):
    o = operands(routing, dtype, device, dropout_p, aligned=routing == "gathered", product=False)
    check(grouped_launchers.grad_a, formulas.grouped_grad_a, o, dtype, config)


@routings
@dtypes
@small("grouped_grad")
def test_db_is_its_formula(config, dtype, routing, short_chunks, seed, device):
    o = operands(routing, dtype, device, 0.3, aligned=routing == "gathered", product=False)
    check(grouped_launchers.grad_b, formulas.grouped_grad_b, o, dtype, config)


@dropout
@routings
@small("grouped_grad")
def test_terms_of_float32_dh_and_h(config, routing, dropout_p, terms, short_chunks, seed, device):
    aligned = routing == "gathered"
    o = operands(
        routing, torch.bfloat16, device, dropout_p, aligned, product=False, lora_dtype=torch.float32
    )
    for unread in (o.h, o.dh):
        unread[unread.isnan()] = torch.inf  # terms of NaN would look as if nobody had written them
    check(grouped_launchers.grad_a, formulas.grouped_grad_a, o, torch.float32, config)
    check(grouped_launchers.grad_b, formulas.grouped_grad_b, o, torch.float32, config)


@pytest.mark.parametrize(("size", "partner"), [(1e-7, 2.0**12), (2.0**24, 2.0**-18)], ids=str)
@routings
@small("grouped_grad")
def test_float16_h_and_dh_of_any_size(config, routing, size, partner, short_chunks, seed, device):
    o = operands(routing, torch.float16, device, 0.3, routing == "gathered", product=False)
    for large, met in ((o.h, o.dy), (o.dh, o.x)):
        large.mul_(size)
        large[:, ::2].mul_(2.0**-12)  # ranks of very different size
        met.mul_(partner)
    for name in ("grad_a", "grad_b"):
        with scratch_of_nan():
            (grad,) = getattr(grouped_launchers, name)(o, config)
        formula = getattr(formulas, f"grouped_{name}")
        (exact,), (baseline,) = formula(o, torch.float64), formula(o, torch.float32)
        assert_close(grad, exact, baseline.half(), name)


@pytest.mark.parametrize("routing", ["several of a group", "experts"])
@dtypes
def test_the_tables_tiles(dtype, routing, seed, device):
    o = operands(routing, dtype, device, 0.3)
    check(grouped_launchers.grad_a, formulas.grouped_grad_a, o, dtype, None)
    check(grouped_launchers.grad_b, formulas.grouped_grad_b, o, dtype, None)


def test_a_group_without_rows_gets_zeros(seed, device):
    o = operands("in order", torch.float32, device)
    with scratch_of_nan():
        (da,) = grouped_launchers.grad_a(o, None)
    assert da[0].any()
    assert not da[1].any()
