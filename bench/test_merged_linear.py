"""LoRAMergedLinear: at least twice as fast as loralib."""

import pytest

from bench import providers, report, shapes

CELLS = {str(cell): cell for cell in shapes.MERGED_LINEAR}
PROVIDERS = {
    "frozen": providers.frozen,
    "loralib": providers.loralib,
    "lora_kernels": providers.lora_kernels,
}


@pytest.mark.parametrize("cell", CELLS, indirect=True, scope="module")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_merged_linear(row, enforced):
    assert not (enforced and report.lost(row, speedup=2)), report.describe(row)
