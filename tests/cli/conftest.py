"""main() in this process, as a new one would have it."""

import os
import sys

import pytest

from lora_kernels import unpatch_peft
from lora_kernels.cli import main


@pytest.fixture
def in_process(monkeypatch):
    """main(), with all that it changes of the process put back; it starts as a new one does."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed leaves its own
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield main
    unpatch_peft()
