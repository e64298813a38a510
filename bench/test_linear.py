"""LoRALinear: never slower than loralib or PEFT."""

import pytest

from bench import providers, report, shapes

CELLS = {str(cell): cell for cell in shapes.LINEAR}
PROVIDERS = {
    "frozen": providers.frozen,
    "loralib": providers.loralib,
    "peft": providers.peft,
    "lora_kernels": providers.lora_kernels,
}


@pytest.mark.parametrize("cell", CELLS, indirect=True, scope="module")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_linear(row, enforced):
    assert not (enforced and report.lost(row)), report.describe(row)
