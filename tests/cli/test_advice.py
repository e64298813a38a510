"""What doctor says of compilers, of what was measured, and of PyTorch's deterministic mode."""

import shutil
import sysconfig

import pytest
import torch

from lora_kernels.cli import advice
from lora_kernels.cli.advice import Missing, compiler, notes
from lora_kernels.dispatch import cache as caches
from lora_kernels.dispatch import measured
from lora_kernels.tuning import machine

UNMEASURED = [{"product": "decoding", "reason": "no measurement for capability (8, 6) holds here"}]


@pytest.fixture(autouse=True)
def here(cache, monkeypatch):
    for name in ("CC", "LORA_KERNELS_CHECK", "LORA_KERNELS_PLAN", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_that_compiles_lacks_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert compiler() == []


def test_what_triton_compiles_with_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    gcc, headers = compiler()
    assert gcc.what == "no C compiler for Triton: none of gcc, clang"
    assert headers.what.startswith(str(tmp_path / "Python.h"))
    assert gcc.fix == headers.fix == "apt-get install gcc python3-dev, or set CC"
    monkeypatch.setenv("CC", "icc")
    assert compiler()[0] == Missing("CC=icc is no compiler that Triton could start", "unset CC")


def test_what_was_not_measured_is_a_note(device):
    (note,) = notes(UNMEASURED, device)
    assert note.what == f"algorithms and tiles were not measured on {device}"
    assert note.fix == "lora-kernels tune MODEL"
    assert notes([{"product": "decoding", "reason": "measured on this GPU"}], device) == []


def test_files_in_use_are_named_and_how_to_be_rid_of_them(device, monkeypatch):
    measured.add(device, tiles=[{"kernel": "shrink"}])
    caches.write("checked", device, {"shrink float32": None, "expand_y float16": "two runs differ"})
    monkeypatch.setenv("LORA_KERNELS_CHECK", "0")
    tuned, checked, off = notes([], device)
    assert tuned.what == f"{caches.path_of('tuned', device)} is in use: 0 algorithms, 1 tiles"
    assert tuned.fix == "lora-kernels tune --clear removes it"
    assert "2 kernels are checked, 1 are wrong; expand_y float16" in checked.what
    assert off.fix == "unset LORA_KERNELS_CHECK"


@pytest.mark.skipif(torch.cuda.is_available(), reason="files of the interpreter")
def test_files_of_the_interpreter_are_in_use_only_if_it_is(device, monkeypatch):
    measured.add(device, tiles=[{"kernel": "shrink"}])
    caches.write("checked", device, {"shrink float32": None})
    assert len(notes([], device)) == 2
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("LORA_KERNELS_CHECK", "0")
    assert notes([], device) == []


def test_deterministic_mode_is_a_note(device, monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        (note,) = notes([], device)
        assert "deterministic mode is on" in note.what
        assert note.fix.startswith("set CUBLAS_WORKSPACE_CONFIG=:4096:8")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert "use_deterministic_algorithms(False)" in notes([], device)[0].fix
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_device_for_kernels_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert machine.device_of_kernels() is None
    assert advice.notes([], torch.device("cpu")) == []


@pytest.mark.parametrize("plan", ["auto", "reference", "fused", "addmm"])
def test_an_algorithm_that_a_cpu_does_not_take_is_a_note(monkeypatch, plan):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("LORA_KERNELS_PLAN", plan)
    found = [note.what for note in advice.notes([], torch.device("cpu"))]
    words = f"LORA_KERNELS_PLAN={plan} chooses on a GPU; on a CPU PyTorch's operators run"
    assert found == ([] if plan in ("auto", "reference") else [words])
