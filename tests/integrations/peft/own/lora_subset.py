"""A plugin for pytest in PEFT's own tests: those of LoRA, with the patch or without, and outcomes.

python -m pytest -p lora_subset tests/test_custom_models.py, with this folder on PYTHONPATH.
LORA_KERNELS_PATCH=1 patches PEFT; LORA_KERNELS_OUTCOMES names the file that gets, as JSON, the
outcome of each test and how many calls were fused.
"""

import json
import os
from pathlib import Path

import peft

from lora_kernels import functional, patch_peft, unpatch_peft

PATCH = os.environ.get("LORA_KERNELS_PATCH") == "1"
outcomes = {}
fused = 0


def pytest_configure():
    if not PATCH:
        return
    compute = functional.lora_forward

    def counted(*args):
        global fused
        fused += 1
        return compute(*args)

    functional.lora_forward = counted
    patch_peft()


def pytest_unconfigure():
    if PATCH:
        unpatch_peft()  # raises if a test has left a forward of its own


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if _is_of_lora(item)]


def _is_of_lora(item) -> bool:
    """Whether a test is given LoraConfig, or no class of configurations at all."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = [v for v in values if isinstance(v, type) and issubclass(v, peft.PeftConfig)]
    return not kinds or peft.LoraConfig in kinds


def pytest_runtest_logreport(report):
    worst = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = report.outcome if worst == "passed" else worst


def pytest_sessionfinish():
    path = Path(os.environ["LORA_KERNELS_OUTCOMES"])
    path.write_text(json.dumps({"outcomes": outcomes, "fused": fused}), encoding="utf-8")
