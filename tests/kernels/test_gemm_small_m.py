"""gemm_small_m: y and h of a few rows in one launch."""

import itertools

import pytest
import torch

from lora_kernels.dispatch.algorithm import SMALL_M
from lora_kernels.kernels import gemm_small_m
from lora_kernels.kernels.config import GemmConfig
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.kernels.registry import LAUNCHERS
from tests.kernels.cases import (
    GPU,
    check,
    dropout,
    dtypes,
    linear_and_merged,
    operands,
    tiles,
)

META, F32, F16, BF16 = torch.device("meta"), torch.float32, torch.float16, torch.bfloat16


def rows_that_a_program_owns():
    """Configuration and a shape with as many rows as one of its programs owns, or fewer."""
    small = [] if GPU else [GemmConfig(16, 16, 16, num_warps=4, num_stages=1)]
    shapes = [(1, 1, 1, 1), (5, 7, 11, 3), (16, 64, 128, 16), (37, 65, 70, 17), (64, 96, 40, 32)]
    for config, shape in itertools.product([*tiles("gemm_small_m"), *small], shapes):
        if shape[0] <= config.BLOCK_M:
            yield config, shape


@dropout
@pytest.mark.parametrize(("aligned", "transposed"), [(True, False), (False, True)], ids=str)
@linear_and_merged
@dtypes
@pytest.mark.parametrize(("config", "shape"), list(rows_that_a_program_owns()), ids=str)
def test_gemm_small_m_is_its_formula(
    config, shape, dtype, groups, aligned, transposed, dropout_p, seed, device
):
    o = operands(
        shape, dtype, device, dropout_p=dropout_p, aligned=aligned, groups=groups, bias=aligned,
        transposed=transposed,
    )  # fmt: skip
    check("gemm_small_m", o, config, y=dtype, h=torch.float32)


@dropout
@linear_and_merged
@pytest.mark.parametrize(("config", "shape"), list(rows_that_a_program_owns()), ids=str)
def test_terms_of_a_float32_a(config, shape, groups, dropout_p, rounded_bfloat16, seed, device):
    o = operands(shape, BF16, device, dropout_p=dropout_p, groups=groups, lora_dtype=F32)
    check("gemm_small_m", o, config, y=BF16, h=F32)


def test_an_infinite_a_makes_no_nan(rounded_bfloat16, seed, device):
    o = operands((5, 7, 11, 3), BF16, device, lora_dtype=F32)
    o.a[1] = torch.tensor([torch.inf] + [torch.finfo(F32).max * 2.0**-4] * 6, device=device)
    o.x = o.x.abs()
    _, h = LAUNCHERS["gemm_small_m"](o, None)
    assert (h[:, 1] == torch.inf).all()
    assert h[:, [0, 2]].isfinite().all()


@dropout
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@dtypes
@pytest.mark.parametrize(("config", "shape"), list(rows_that_a_program_owns()), ids=str)
def test_columns_are_scaled_before_bias_is_added(
    config, shape, dtype, bias, dropout_p, seed, device
):
    o = operands(shape, dtype, device, dropout_p=dropout_p, bias=bias)
    check("gemm_small_m_scaled", o, config, y=dtype, h=torch.float32)


@pytest.mark.parametrize(
    ("m", "dtype", "lora", "rows"),
    [
        (16, BF16, BF16, 16), (17, BF16, BF16, 64), (64, F16, F16, 64), (1, F16, F16, 16),
        (1, BF16, F32, 16), (1, F16, F32, 16), (1, F32, F32, 64),
    ],
    ids=str,
)  # fmt: skip
def test_config_for_serves_all_rows(hopper, m, dtype, lora, rows):
    x, a = torch.empty(m, 16, dtype=dtype, device=META), torch.empty(4, 16, dtype=lora, device=META)
    config = gemm_small_m.config_for(x, numerics_of(x, a))
    assert rows == config.BLOCK_M
    wide = dtype == F16 and lora == F32  # whose terms are made in registers
    depth = {16: 64 if wide else 128, 64: 32 if dtype == F32 else 64}
    assert depth[rows] == config.BLOCK_K


@pytest.mark.parametrize("table", gemm_small_m.TILES.values(), ids=gemm_small_m.TILES)
def test_tiles_own_the_rows_that_their_entry_serves(table):
    assert all(min(when.m, SMALL_M) <= config.BLOCK_M for when, config in table)


@pytest.mark.parametrize(
    ("m", "r", "dropout_p", "lora", "expected"),
    [
        (64, 64, 0.0, BF16, True), (65, 64, 0.0, BF16, False), (64, 65, 0.0, BF16, False),
        (16, 8, 0.1, BF16, True), (17, 8, 0.1, BF16, False),
        (1, 32, 0.0, F32, True), (1, 33, 0.0, F32, False),
    ],
    ids=str,
)  # fmt: skip
def test_supports_a_small_m_and_ranks_of_one_block(hopper, m, r, dropout_p, lora, expected):
    x, a = torch.empty(m, 16, dtype=BF16, device=META), torch.empty(r, 16, dtype=lora, device=META)
    assert gemm_small_m.supports(m, r, dropout_p, numerics_of(x, a)) == expected
