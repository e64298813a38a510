"""gemm_fwd: y = x · wᵀ + bias + scaling · h · bᵀ."""

import pytest

from tests.kernels.cases import check, dtypes, gemms, linear_and_merged, operands, shapes


@linear_and_merged
@shapes
@dtypes
@gemms("gemm_fwd")
def test_gemm_fwd_is_its_formula(config, aligned, transposed, dtype, shape, groups, seed, device):
    if groups and config.tma and transposed:  # a descriptor starts at multiples of 16 bytes
        groups = [(-(-size // 8) * 8, on) for size, on in groups]
    o = operands(
        shape, dtype, device, aligned=aligned, groups=groups, bias=aligned, transposed=transposed
    )
    check("gemm_fwd", o, config, y=dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@shapes
@dtypes
@gemms("gemm_fwd", subtiles=(1, 2, 4))
def test_columns_are_scaled_before_bias_is_added(
    config, aligned, transposed, dtype, shape, bias, seed, device
):
    o = operands(shape, dtype, device, aligned=aligned, bias=bias, transposed=transposed)
    check("gemm_fwd_scaled", o, config, y=dtype)
