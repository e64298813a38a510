"""grouped_gemm: the large product and the update of y, and of dx, by segments."""

import pytest

from lora_kernels.kernels import formulas, grouped_launchers
from lora_kernels.kernels.config import GemmConfig
from tests.kernels.cases import GPU, dtypes, tiles
from tests.kernels.grouped_cases import check, dropout, operands, routings

SMALL = GemmConfig(16, 16, 16, num_warps=4, num_stages=1)
small = pytest.mark.parametrize("config", tiles("grouped_gemm") if GPU else [SMALL], ids=str)


def stored(o, transposed):
    """The same operands; transposed: each weight is stored [K, N]."""
    if transposed:
        o.w = o.w.mT.contiguous().mT
    return o


@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@routings
@dtypes
@small
def test_y_is_its_formula(config, dtype, routing, transposed, seed, device):
    o = operands(routing, dtype, device, bias=not transposed, aligned=routing == "gathered")
    o = stored(o, transposed)
    check(grouped_launchers.gemm_y, formulas.grouped_gemm_y, o, dtype, config)


@dropout
@routings
@dtypes
@small
def test_dx_is_its_formula(config, dtype, routing, dropout_p, seed, device):
    o = operands(routing, dtype, device, dropout_p, aligned=routing == "gathered")
    o = stored(o, dropout_p == 0)
    check(grouped_launchers.gemm_dx, formulas.grouped_gemm_dx, o, dtype, config)


@pytest.mark.parametrize("routing", ["several of a group", "experts"])
@dtypes
def test_the_tables_tiles(dtype, routing, seed, device):
    o = operands(routing, dtype, device, 0.3)
    check(grouped_launchers.gemm_y, formulas.grouped_gemm_y, o, dtype, None)
    check(grouped_launchers.gemm_dx, formulas.grouped_gemm_dx, o, dtype, None)
