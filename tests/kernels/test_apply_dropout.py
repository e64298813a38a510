"""apply_dropout: x_hat = mask ∘ x / (1 - p)."""

from tests.kernels.cases import check, dtypes, lying, operands, shapes, skinny


@lying
@shapes
@dtypes
@skinny("apply_dropout")
def test_apply_dropout_is_its_formula(config, dtype, shape, aligned, seed, device):
    o = operands(shape, dtype, device, dropout_p=0.3, aligned=aligned)
    check("apply_dropout", o, config, x_hat=dtype)
