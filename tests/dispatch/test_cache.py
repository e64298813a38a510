"""Files of what this machine has measured: which are read, and how they change."""

import errno
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from lora_kernels.dispatch import cache as caches

CPU = torch.device("cpu")
TORCH = f'"torch": "{torch.__version__}"'


def test_what_is_written_is_read(cache, device):
    assert caches.read("tuned", device) == {}
    path = caches.write("tuned", device, {"a": [1, None]})
    assert path.parent == cache
    assert caches.read("tuned", device) == {"a": [1, None]}
    assert caches.read("checked", device) == {}
    assert os.listdir(cache) == [path.name]  # nothing is left beside it


def test_the_directory_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.directory() == tmp_path / "lora_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert caches.directory() == tmp_path / "home" / ".cache" / "lora_kernels"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: "[]", "not a file of format 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "not a file of format 1"),
        (lambda text: text.replace('"machine"', '"other"'), "does not say what it holds for"),
        (lambda text: text.replace('"content": {', '"content": 1, "x": {'), "does not say what"),
        (lambda text: text.replace(TORCH, '"torch": "1.0"'), "it is of torch 1.0, this is"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_hold_here_is_ignored_with_one_line(cache, change, why):
    path = caches.write("tuned", CPU, {"a": 1})
    path.write_text(change(path.read_text()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert caches.read("tuned", CPU) == {}
        assert caches.read("tuned", CPU) == {}
    (message,) = [str(w.message) for w in caught]
    assert str(path) in message
    assert why in message
    assert "\n" not in message


def test_a_failing_write_leaves_the_file_and_nothing_beside_it(cache):
    path = caches.write("tuned", CPU, {"a": 1})
    with pytest.raises(TypeError):
        caches.write("tuned", CPU, {"a": object()})
    assert caches.read("tuned", CPU) == {"a": 1}
    assert os.listdir(cache) == [path.name]


def test_clear_removes_one_kind_of_a_device_or_of_all_machines(cache):
    of_here = caches.write("tuned", CPU, {})
    other = of_here.with_name("tuned-another-gpu.json")
    other.write_text("{}")
    kept = caches.write("checked", CPU, {})
    assert caches.clear("tuned", CPU) == [of_here]
    assert sorted(os.listdir(cache)) == sorted([kept.name, other.name])
    assert caches.clear("tuned", CPU) == []
    caches.write("tuned", CPU, {})
    assert caches.clear("tuned", None) == sorted([of_here, other])
    assert os.listdir(cache) == [kept.name]


def test_a_verdict_holds_for_these_kernels(cache, monkeypatch):
    path = caches.write("checked", CPU, {})
    digest = json.loads(path.read_text())["machine"]["kernels"]
    assert len(digest) == 16
    caches.machine.cache_clear()
    monkeypatch.setattr(caches, "_digest", lambda: "another")
    with pytest.warns(RuntimeWarning, match=f"of kernels {digest}, this is kernels another"):
        assert caches.read("checked", CPU) == {}
    caches.machine.cache_clear()


def test_one_process_at_a_time_is_inside(cache):
    code = """
import sys, torch
from lora_kernels.dispatch import cache
try:
    with cache.exclusive("tuned"):
        print("inside")
except cache.BusyError as error:
    print(error)
"""
    with caches.exclusive("tuned"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"process {os.getpid()} holds" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "inside\n", done.stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_nobody(cache, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caches.exclusive("tuned"):
        pass


def test_a_directory_that_no_file_system_takes_is_one_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", f"/{'x' * 300}")
    assert caches.read("tuned", CPU) == {}
    assert caches.files("tuned") == []
    with pytest.raises(OSError, match="xxx"):
        caches.write("tuned", CPU, {})


def test_a_home_in_the_variable_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORA_KERNELS_CACHE", "~/measured")  # as a file of settings has it
    assert caches.directory() == tmp_path / "measured"


def test_a_user_without_a_home_has_no_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert caches.read("tuned", CPU) == {}
        assert caches.files("tuned") == []
    with pytest.raises(OSError, match="lora_kernels"):
        caches.write("tuned", CPU, {})
    with pytest.raises(OSError, match="lora_kernels"), caches.exclusive("tuned"):
        pass
    assert list(tmp_path.iterdir()) == []
