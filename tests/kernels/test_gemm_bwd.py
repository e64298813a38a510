"""gemm_bwd: dx = dy · w + mask ∘ (dh · a)."""

from tests.kernels.cases import check, dropout, dtypes, gemms, operands, shapes


@dropout
@shapes
@dtypes
@gemms("gemm_bwd", subtiles=(1, 2, 4))
def test_gemm_bwd_is_its_formula(
    config, aligned, transposed, dtype, shape, dropout_p, seed, device
):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned, transposed=transposed)
    check("gemm_bwd", o, config, dx=dtype)
