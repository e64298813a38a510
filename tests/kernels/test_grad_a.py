"""grad_a: da = dhᵀ · x_hat."""

from tests.kernels.cases import check, dropout, dtypes, lying, operands, shapes, skinny


@dropout
@shapes
@dtypes
@skinny("grad_a")
@lying
def test_grad_a_is_its_formula(aligned, config, dtype, shape, dropout_p, seed, device):
    o = operands(shape, dtype, device, dropout_p=dropout_p, aligned=aligned)
    check("grad_a", o, config, da=dtype)
