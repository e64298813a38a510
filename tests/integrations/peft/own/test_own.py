"""``pytest -m peft_own``: PEFT's own tests of LoRA end with the patch as they do without it.

PyPI's source distribution of the installed version brings them. They need diffusers and PyYAML.
"""

import collections
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.peft_own

FILE = "tests/test_custom_models.py"


@pytest.fixture
def source(tmp_path):
    """The source distribution of the PEFT that is installed."""
    pytest.importorskip("diffusers")
    pytest.importorskip("yaml")
    release = f"peft-{importlib.metadata.version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
    done = subprocess.run(
        [*command, release.replace("-", "=="), "--dest", tmp_path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{release} cannot be had: {done.stderr.strip()[-300:]}")
    with tarfile.open(tmp_path / f"{release}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / release / "tests" / "__init__.py").touch()  # is in the repository alone
    return tmp_path / release


def test_with_the_patch_the_same_tests_pass(source, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "lora_subset", FILE]
    running, found = {}, {}
    for patch in ("0", "1"):
        environment = os.environ | {
            "LORA_KERNELS_PATCH": patch,
            "LORA_KERNELS_OUTCOMES": str(tmp_path / f"outcomes{patch}.json"),
            "PYTHONPATH": str(Path(__file__).parent),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with (tmp_path / f"log{patch}").open("w") as log:
            running[patch] = subprocess.Popen(
                command, cwd=source, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    for patch, process in running.items():
        process.wait(timeout=1800)
        log, outcomes = tmp_path / f"log{patch}", tmp_path / f"outcomes{patch}.json"
        assert outcomes.exists(), log.read_text()[-4000:]
        found[patch] = json.loads(outcomes.read_text())
    without, with_patch = found["0"]["outcomes"], found["1"]["outcomes"]
    print("without the patch", collections.Counter(without.values()))
    print("with the patch   ", collections.Counter(with_patch.values()))
    print("calls fused      ", found["1"]["fused"])
    assert found["0"]["fused"] == 0
    assert found["1"]["fused"] > 500
    assert {name: (without[name], outcome) for name, outcome in with_patch.items()
            if outcome != without[name]} == {}  # fmt: skip
    assert sum(outcome == "passed" for outcome in with_patch.values()) > 1000
