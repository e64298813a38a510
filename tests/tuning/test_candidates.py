"""What is tried: grids without duplicates, within their limits."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels.config import GemmConfig, SkinnyConfig, When
from lora_kernels.kernels.registry import KERNELS, kernel_of
from lora_kernels.tuning import candidates
from lora_kernels.tuning.shapes import Shape

SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16)
SKINNY = [
    each.name for kernel in KERNELS.values() if not kernel.is_gemm for each in kernel.launchers
]
LARGE = ["gemm_fwd", "gemm_fwd_scaled", "gemm_bwd", "grouped_gemm_y", "grouped_gemm_dx"]


@pytest.mark.parametrize("name", SKINNY)
def test_grid_of_a_skinny_kernel_has_no_duplicates_and_keeps_its_limits(name):
    grid = candidates.grid(name, SHAPE, When(tma=True))
    assert 20 <= len(set(grid)) == len(grid) <= 120
    for config in grid:
        assert config.BLOCK_ROWS in (32, 64, 128, 256)
        assert config.BLOCK_COLS in (32, 64, 128, 256)
        assert 2048 <= config.BLOCK_ROWS * config.BLOCK_COLS <= 16384
    assert {config.num_warps for config in grid} == {4, 8}
    staged = not kernel_of(name).name.endswith(("expand", "dequantize", "apply_dropout"))
    cut = staged and kernel_of(name).name not in ("grouped_grad", "weight_norm")
    assert {config.num_stages for config in grid} == ({2, 3, 4} if staged else {1})
    assert {config.programs_per_sm for config in grid} == ({1, 2, 4} if cut else {2})


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [16, 64, 65, 8192])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_grid_of_a_large_product_has_no_duplicates_and_keeps_its_limits(name, tma, m, dropout_p):
    cell = dataclasses.replace(SHAPE, m=m, dropout_p=dropout_p)
    grid = candidates.grid(name, cell, When(tma=tma))
    assert 20 <= len(set(grid)) == len(grid) <= 70
    assert {config.tma for config in grid} == ({True, False} if tma else {False})
    cuts = name == "gemm_fwd_scaled" or (name == "gemm_bwd" and dropout_p > 0)
    subtiles = {1, 2, 4} if cuts and m > 64 else {1}
    assert {config.epilogue_subtile for config in grid} == subtiles
    assert {config.BAND_M for config in grid} == ({8} if m <= 64 else {4, 8, 16})
    assert {config.num_stages for config in grid} == {3, 4, 5}
    assert max(config.BLOCK_M for config in grid) == (64 if m <= 64 else 256)
    for config in grid:
        assert config.num_warps in (4, 8)
        assert config.BLOCK_N // config.epilogue_subtile >= 16


@pytest.mark.parametrize(
    ("when", "rows"),
    [
        (When(m=16), 16), (When(bits=16, m=16), 16), (When(m=64), 64), (When(bits=32), 64),
        (When(), 64),
    ],
    ids=str,
)  # fmt: skip
def test_grid_of_gemm_small_m_has_no_duplicates_and_serves_all_that_its_entry_does(when, rows):
    grid = candidates.grid("gemm_small_m", dataclasses.replace(SHAPE, m=1), when)
    assert 20 <= len(set(grid)) == len(grid) <= 70
    assert {config.BLOCK_M for config in grid} == {rows}
    assert {config.BLOCK_N for config in grid} == {16, 32, 64}
    assert {config.num_warps for config in grid} == {4, 8}
    assert {config.num_stages for config in grid} == {3, 4, 5}


def test_thin_is_even_and_repeats_nothing():
    assert candidates.thin(range(10), 5) == [0, 2, 4, 6, 8]
    assert candidates.thin(range(3), 5) == candidates.thin(range(3), None) == [0, 1, 2]
    for limit in range(1, 12):
        assert len(set(candidates.thin(range(11), limit))) == min(limit, 11)


def test_as_run_has_one_subtile_if_nothing_is_masked():
    in_parts = GemmConfig(128, 256, 64, 8, 3, epilogue_subtile=4)
    assert candidates.as_run("gemm_bwd", SHAPE, in_parts) == in_parts
    unmasked = dataclasses.replace(SHAPE, dropout_p=0.0)
    assert candidates.as_run("gemm_bwd", unmasked, in_parts) == GemmConfig(128, 256, 64, 8, 3)


def test_without_unused_keeps_what_the_launcher_depends_on():
    assert candidates.without_unused("gemm_bwd", SHAPE) == SHAPE
    kept = candidates.without_unused("grad_b", SHAPE)
    assert kept == dataclasses.replace(SHAPE, k=1, dropout_p=0.0)


@pytest.mark.parametrize(
    ("when", "written", "words"),
    [
        (When(), "When()", "any product"),
        (When(tma=True, r=16), "When(tma=True, r=16)", "r <= 16, TMA"),
        (When(bits=32, m=64), "When(bits=32, m=64)", "32 bits, m <= 64"),
    ],
    ids=str,
)
def test_source_and_in_words_tell_which_products_an_entry_serves(when, written, words):
    assert candidates.source(when) == written
    assert candidates.in_words(when) == words


def test_source_leaves_defaults_out():
    config = SkinnyConfig(256, 64, num_warps=8, num_stages=3, programs_per_sm=1)
    written = "SkinnyConfig(256, 64, num_warps=8, num_stages=3, programs_per_sm=1)"
    assert candidates.source(config) == written
    config = dataclasses.replace(config, programs_per_sm=2)
    assert candidates.source(config) == "SkinnyConfig(256, 64, num_warps=8, num_stages=3)"
