"""What is tried: grids without duplicates, within their limits."""

import dataclasses

import pytest
import torch

from lora_kernels.tuning import candidates
from lora_kernels.tuning.launchers import LAUNCHERS, Gemm
from lora_kernels.tuning.shapes import Shape

SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16)
SKINNY = [name for name in LAUNCHERS if LAUNCHERS[name].dots]
LARGE = [name for name in LAUNCHERS if not LAUNCHERS[name].dots and name != "few_rows"]


@pytest.mark.parametrize("name", SKINNY)
def test_grid_of_a_skinny_kernel_has_no_duplicates_and_keeps_its_limits(name):
    grid = candidates.grid(name, SHAPE, tma=True)
    assert 20 <= len(set(grid)) == len(grid) <= 120
    for config in grid:
        assert config.BLOCK_ROWS in (32, 64, 128, 256)
        assert config.BLOCK_COLS in (32, 64, 128, 256)
        assert 2048 <= config.BLOCK_ROWS * config.BLOCK_COLS <= 16384
    assert {config.num_warps for config in grid} == {4, 8}
    cut = not name.startswith("fill")
    assert {config.num_stages for config in grid} == ({2, 3, 4} if cut else {1})
    assert {config.waves for config in grid} == ({1, 2, 4} if cut else {2})


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [16, 64, 65, 8192])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("name", LARGE)
def test_grid_of_a_large_product_has_no_duplicates_and_keeps_its_limits(name, tma, m, dropout_p):
    cell = dataclasses.replace(SHAPE, m=m, dropout_p=dropout_p)
    grid = candidates.grid(name, cell, tma)
    assert 20 <= len(set(grid)) == len(grid) <= 70
    assert {config.tma for config in grid} == ({True, False} if tma else {False})
    masked = name == "dx" and dropout_p > 0 and m > 64
    assert {config.pieces for config in grid} == ({1, 2, 4} if masked else {1})
    assert {config.GROUP_M for config in grid} == ({8} if m <= 64 else {4, 8, 16})
    assert {config.num_stages for config in grid} == {3, 4, 5}
    assert max(config.BLOCK_M for config in grid) == (64 if m <= 64 else 256)
    for config in grid:
        assert config.num_warps in (4, 8)
        assert config.BLOCK_N // config.pieces >= 16


@pytest.mark.parametrize(
    ("m", "dtype", "rows"),
    [
        (1, torch.float16, 16), (16, torch.float16, 16), (17, torch.float16, 64),
        (64, torch.float16, 64), (1, torch.float32, 64),
    ],
    ids=str,
)  # fmt: skip
def test_grid_of_few_rows_has_no_duplicates_and_serves_all_that_its_entry_does(m, dtype, rows):
    grid = candidates.grid("few_rows", dataclasses.replace(SHAPE, m=m, dtype=dtype), tma=True)
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


def test_as_run_has_one_piece_if_nothing_is_masked():
    in_pieces = Gemm(128, 256, 64, 8, 3, pieces=4)
    assert candidates.as_run("dx", SHAPE, in_pieces) == in_pieces
    unmasked = dataclasses.replace(SHAPE, dropout_p=0.0)
    assert candidates.as_run("dx", unmasked, in_pieces) == Gemm(128, 256, 64, 8, 3)
