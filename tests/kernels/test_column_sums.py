"""column_sums: the column sums of dy ∘ (z - bias)."""

import pytest
import torch

from tests.kernels.cases import check, dtypes, lying, operands, shapes, skinny


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@lying
@shapes
@dtypes
@skinny("column_sums")
def test_column_sums_is_its_formula(config, dtype, shape, aligned, bias, seed, device):
    o = operands(shape, dtype, device, aligned=aligned, bias=bias)
    check("column_sums", o, config, sums=torch.float32)
