"""expand: scaling · h · bᵀ + bias, y += scaling · h · bᵀ, and mask ∘ (dh · a); with a magnitude."""

import itertools

import pytest
import torch

from lora_kernels.kernels import formulas
from lora_kernels.kernels.expand import expand_add_y
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.spec import LoraSpec, OutputSplits
from lora_kernels.testing.memory import between_nan
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import (
    DTYPES,
    GROUPS,
    check,
    dropout,
    dtypes,
    linear_and_merged,
    operands,
    shapes,
    skinny,
    tiles,
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


@linear_and_merged
@shapes
@dtypes
@pytest.mark.parametrize("config", tiles("expand"), ids=str)
def test_expand_add_y_is_its_formula(config, dtype, shape, groups, seed, device):
    check("expand_add_y", operands(shape, dtype, device, groups=groups), config, y=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@shapes
@dtypes
@skinny("expand")
def test_expand_scale_y_is_its_formula(config, dtype, shape, bias, seed, device):
    check("expand_scale_y", operands(shape, dtype, device, bias=bias), config, y=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@shapes
@dtypes
@skinny("expand")
def test_expand_split_y_is_its_formula(config, dtype, shape, bias, seed, device):
    check("expand_split_y", operands(shape, dtype, device, bias=bias), config, c=dtype, y=dtype)


@shapes
@dtypes
@skinny("expand")
def test_expand_mask_dx_is_its_formula(config, dtype, shape, seed, device):
    check("expand_mask_dx", operands(shape, dtype, device, dropout_p=0.3), config, dx=dtype)


@pytest.mark.parametrize("y_dtype", DTYPES, ids=str)
@dtypes
@skinny("expand")
def test_y_in_its_own_dtype_and_rows_gets_the_update(config, dtype, y_dtype, seed, device):
    """Rows apart, another dtype than x; columns of a disabled group keep their bits, also -0."""
    o = operands((33, 24, 0, 17), dtype, device, groups=GROUPS)
    ends = list(itertools.accumulate(size for size, _ in GROUPS))
    parts = [(slice(end - size, end), on) for (size, on), end in zip(GROUPS, ends, strict=True)]
    o.dy = o.dy.to(y_dtype)
    for columns, enabled in parts:
        if not enabled:
            o.dy[::2, columns] = -0.0
    y = between_nan(o.dy, aligned=False)
    whole = y.as_strided((len(y), y.stride(0)), (y.stride(0), 1))
    assert expand_add_y(y, o.h, o.b, o.spec, numerics_of(y, o.b), config) is y
    (exact,), (baseline,) = (formulas.expand_add_y(o, t) for t in (torch.float64, y_dtype))
    assert_close(y, exact, baseline)
    assert whole[:, y.shape[1] :].isnan().all()
    bits = {2: torch.int16, 4: torch.int32}[y_dtype.itemsize]
    for columns, enabled in parts:
        kept = torch.equal(y[:, columns].view(bits), o.dy[:, columns].view(bits))
        assert kept is not enabled


def test_the_sum_onto_y_is_rounded_once(device):
    """Half of an ulp of y and a little more: an update in float16 would lose the little."""
    y = torch.full((1, 1), 1.0, dtype=torch.float16, device=device)
    h = torch.tensor([[2.0**-11, 2.0**-23]], device=device)
    b = torch.ones(1, 2, device=device)
    spec = LoraSpec(1.0, 0.0, OutputSplits.whole(1))
    expand_add_y(y, h, b, spec, numerics_of(y, b))
    assert y.item() == 1 + 2.0**-10
