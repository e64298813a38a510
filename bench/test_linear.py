"""LoRALinear: never slower than a peer."""

from bench import rows
from bench.providers import PROVIDERS  # noqa: F401 - read by conftest.py


def cells(layers, device, asked):
    return [cell for cell in layers if not cell.merged]


def test_linear(row, enforced):
    assert not (enforced and rows.lost(row)), row["ours_over_peer"]
