"""loralib's modules have namesakes here, with all that loralib defines or imports from itself."""

from importlib import import_module

import pytest

NAMES = {
    "loralib": "lora_kernels",
    "loralib.layers": "lora_kernels.layers",
    "loralib.utils": "lora_kernels.utils",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_module_serves_the_names_of_loralibs(module):
    own = {
        name
        for name, value in vars(import_module(module)).items()
        if getattr(value, "__module__", "").startswith("loralib")
    }
    assert own
    here = import_module(NAMES[module])
    assert not {name for name in own if not hasattr(here, name)}
