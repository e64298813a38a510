"""Fixtures of every test: the device, the algorithm, and a seed that a failing test prints."""

import atexit
import os
import random
import shutil
import sys
import tempfile
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of one worker would wait for cores that another's hold. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# What the user's machine has measured is not what is tested, and tests leave no file there.
os.environ["LORA_KERNELS_CACHE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["LORA_KERNELS_CACHE"], ignore_errors=True)

if not torch.cuda.is_available():
    # Read when triton is imported: kernels run in its interpreter, on CPU tensors. Fixtures of a
    # wider scope than a test, and processes that they start, are not to run them unasked.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["LORA_KERNELS_PLAN"] = "reference"


os.environ["LORA_KERNELS_QUIET"] = "1"  # what training under patch_peft() says once


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def algorithm(monkeypatch, request) -> str:
    """What LORA_KERNELS_PLAN is: the fixture's parameter, or what a user's process has.

    On a CPU that is the reference: interpreted kernels are slow, and wrong in bfloat16.
    """
    default = "auto" if torch.cuda.is_available() else "reference"
    name = getattr(request, "param", default)
    monkeypatch.setenv("LORA_KERNELS_PLAN", name)
    return name


@pytest.fixture(autouse=True)
def unrecorded():
    """No call is computed by the record of another test, which may have put in other launchers."""
    if records := sys.modules.get("lora_kernels.kernels.records"):
        records.forget()


@pytest.fixture
def seed(request) -> int:
    """The seed of this test, set in torch: one of its name, which no run changes.

    LORA_KERNELS_TEST_SEED=fresh draws another; a number repeats a printed one.
    """
    chosen = os.environ.get("LORA_KERNELS_TEST_SEED", zlib.crc32(request.node.nodeid.encode()))
    value = random.randrange(2**31) if chosen == "fresh" else int(chosen)
    print(f"seed: LORA_KERNELS_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and nothing of it in this process, before the test and after it."""
    from lora_kernels.dispatch import measured

    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    measured.forget()
    yield tmp_path / "cache"
    measured.forget()


@pytest.fixture
def unpatched():
    """PEFT is as it comes from PyPI, before the test and after it."""
    from peft.tuners.lora.layer import Linear

    from lora_kernels import unpatch_peft
    from tests.peft_models import UPSTREAM

    assert Linear.forward is UPSTREAM
    yield
    unpatch_peft()
    assert Linear.forward is UPSTREAM


@pytest.fixture
def patched(unpatched):
    from lora_kernels import patch_peft

    patch_peft()


@pytest.fixture
def fresh_accelerate():
    """accelerate takes another mixed precision in a process that has not used it yet."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
