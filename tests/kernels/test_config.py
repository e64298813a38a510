"""select, target_of: which entry of a table serves a product."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels import config
from lora_kernels.kernels.config import GemmConfig, Tiles, When, select
from lora_kernels.kernels.registry import KERNELS

SMALL, LARGE, DESCRIPTORS, HIGH, FLOAT32 = (
    GemmConfig(size, 64, 64, 4, 2) for size in range(16, 21)
)
TABLE = Tiles(
    sm_90=[
        (When(bits=32), FLOAT32),
        (When(m=64), SMALL),
        (When(tma=True, r=16), DESCRIPTORS),
        (When(tma=True), HIGH),
        (When(), LARGE),
    ]
)
TABLES = {name: kernel.tiles for name, kernel in KERNELS.items() if kernel.tiles is not None}


@pytest.mark.parametrize(
    ("bits", "m", "r", "tma", "expected"),
    [
        (32, 1, 1, True, FLOAT32), (32, 8192, 99, False, FLOAT32),
        (16, 64, 99, True, SMALL), (16, 65, 16, True, DESCRIPTORS),
        (16, 65, 17, True, HIGH), (16, 65, 16, False, LARGE), (16, 65, 17, False, LARGE),
    ],
    ids=str,
)  # fmt: skip
def test_select_takes_the_first_entry_that_holds(bits, m, r, tma, expected):
    assert select(TABLE, "sm_90", bits, m, r, tma) is expected


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((8, 9), "other")],
    ids=str,
)
def test_target_of_a_gpu_without_a_table_is_other(monkeypatch, capability, target):
    monkeypatch.setattr(config, "capability_of", lambda device: capability)
    assert config.target_of(torch.device("cuda", 0)) == target


@pytest.mark.parametrize(
    ("capability", "target"), [((9, 4), "hip"), ((11, 0), config.WAVE32), ((12, 0), config.WAVE32)]
)
def test_target_of_an_amd_gpu_is_by_the_width_of_its_warps(monkeypatch, capability, target):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(config, "capability_of", lambda device: capability)
    assert config.target_of(torch.device("cuda", 0)) == target


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_narrow_warps_are_twice_as_many_unless_the_table_has_its_own(table):
    wide, narrow = (select(table, target, 16) for target in ("hip", config.WAVE32))
    if config.WAVE32 not in table:
        assert narrow == dataclasses.replace(wide, num_warps=2 * wide.num_warps)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_serve_every_product_on_every_target(table):
    targets = {"interpreter", "sm_80", "sm_90", "sm_100", "hip", "other"}
    assert set(table) in (targets, targets | {config.WAVE32})
    for target in table:
        *_, (last, _) = table[target]
        assert last == When(), "the last entry serves what no other does"
        entries = [when for when, _ in table[target]]
        assert len(set(entries)) == len(entries)


@pytest.mark.parametrize(
    ("kernel", "product", "tile"),
    [
        ("gemm_bwd", {"bits": 16, "m": 8192, "r": 16, "tma": True}, (128, 256, 64)),
        ("gemm_bwd", {"bits": 16, "m": 8192, "r": 17, "tma": True}, (128, 128, 64)),
        ("gemm_bwd", {"bits": 16, "m": 8192, "r": 16}, (128, 64, 32)),
        ("gemm_bwd", {"bits": 16, "m": 64, "tma": True}, (64, 64, 64)),
        ("gemm_bwd", {"bits": 32, "m": 64, "tma": True}, (64, 64, 16)),
        ("gemm_fwd", {"bits": 16, "m": 8192, "r": 16, "tma": True}, (128, 256, 64)),
        ("gemm_fwd", {"bits": 16, "m": 8192, "r": 17, "tma": True}, (128, 256, 64)),
        ("gemm_fwd", {"bits": 16, "m": 8192, "r": 16}, (128, 128, 32)),
        ("gemm_fwd", {"bits": 16, "m": 64, "tma": True}, (64, 64, 64)),
        ("gemm_fwd", {"bits": 32, "m": 64, "tma": True}, (64, 64, 32)),
        ("grad_b", {"bits": 16, "r": 16}, (256, 64)),
        ("grad_b", {"bits": 16, "r": 17}, (128, 64)),
        ("grad_b", {"bits": 32, "r": 17}, (64, 32)),
        ("shrink", {"bits": 16, "r": 17}, (128, 64)),
        ("shrink", {"bits": 32, "r": 16}, (64, 32)),
    ],
    ids=str,
)
def test_select_on_sm_90(kernel, product, tile):
    chosen = select(KERNELS[kernel].tiles, "sm_90", **product)
    sizes = (
        (chosen.BLOCK_M, chosen.BLOCK_N, chosen.BLOCK_K)
        if isinstance(chosen, GemmConfig)
        else (chosen.BLOCK_ROWS, chosen.BLOCK_COLS)
    )
    assert sizes == tile


@pytest.mark.parametrize(("r", "tile"), [(16, 128), (17, 64)])
def test_select_on_sm_80_has_other_tiles_for_high_ranks(r, tile):
    chosen = select(KERNELS["gemm_bwd"].tiles, "sm_80", 16, 8192, r, True)
    assert tile == chosen.BLOCK_M
