"""grad_b: dh = scaling · keep_scale · dy · b and db = scaling · dyᵀ · h."""

import pytest
import torch

from lora_kernels.kernels.grad_b import grad_b
from lora_kernels.kernels.registry import LAUNCHERS
from tests.kernels.cases import check, dtypes, linear_and_merged, operands, shapes, skinny


def without_disabled_groups(o):
    """The same operands; what nobody may read of dy is NaN."""
    column = 0
    for size, enabled in zip(o.spec.splits.sizes, o.spec.splits.enabled, strict=True):
        if not enabled:
            o.dy[:, column : column + size] = torch.nan
        column += size
    return o


@linear_and_merged
@shapes
@dtypes
@skinny("grad_b")
def test_grad_b_is_its_formula(config, dtype, shape, groups, seed, device):
    o = without_disabled_groups(operands(shape, dtype, device, groups=groups, dropout_p=0.3))
    check("grad_b", o, config, dh=o.numerics.dh, db=dtype)


@pytest.mark.parametrize("needed", ["dh", "db"])
@linear_and_merged
@shapes
@dtypes
@skinny("grad_b")
def test_grad_b_computes_one_alone_to_the_same_bits(
    config, dtype, shape, groups, needed, seed, device
):
    o = without_disabled_groups(operands(shape, dtype, device, groups=groups, dropout_p=0.3))
    both = grad_b(o.dy, o.b, o.h, o.spec, True, o.numerics, config)
    h = o.h if needed == "db" else None
    dh, db = grad_b(o.dy, o.b, h, o.spec, needed == "dh", o.numerics, config)
    alone, other, expected = (dh, db, both[0]) if needed == "dh" else (db, dh, both[1])
    assert other is None
    assert torch.equal(alone, expected)


@shapes
@dtypes
@skinny("grad_b")
def test_with_a_magnitude_grad_b_is_its_formula(config, dtype, shape, seed, device):
    o = operands(shape, dtype, device, dropout_p=0.3)
    check("grad_b_scaled", o, config, dh=o.numerics.dh, db=dtype)


@linear_and_merged
@shapes
@skinny("grad_b")
def test_terms_of_float32_b_and_h(config, shape, groups, terms, seed, device):
    o = without_disabled_groups(
        operands(
            shape, torch.bfloat16, device, groups=groups, dropout_p=0.3, lora_dtype=torch.float32
        )
    )
    check("grad_b", o, config, dh=torch.float32, db=torch.float32)


def test_terms_of_an_infinite_h(terms, seed, device):
    o = operands((5, 7, 11, 3), torch.bfloat16, device, lora_dtype=torch.float32)
    o.h[2, 1] = torch.inf
    _, db = LAUNCHERS["grad_b"](o, None)
    assert torch.equal(db[:, 1], o.dy[2].float() * torch.inf)
    assert db[:, [0, 2]].isfinite().all()


def test_terms_of_a_finite_h_above_the_largest_bfloat16(terms, rounded_bfloat16, seed, device):
    o = operands((5, 7, 11, 3), torch.bfloat16, device, lora_dtype=torch.float32)
    o.h[2] = torch.finfo(torch.float32).max
    o.dy[2] *= 2.0**-100
    check("grad_b", o, None, dh=torch.float32, db=torch.float32)
