"""LoRAMergedLinear: at least twice as fast as loralib, never slower than another peer."""

from bench import rows
from bench.providers import PROVIDERS  # noqa: F401 - read by conftest.py


def cells(layers, device, asked):
    return [cell for cell in layers if cell.merged]


def test_merged_linear(row, enforced):
    speedup = 2 if row["provider"] == "loralib" else 1
    assert not (enforced and rows.lost(row, speedup)), row["ours_over_peer"]
