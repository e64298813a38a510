"""Files of tensors that are mapped: what is read and written, and how much memory that takes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters import mapped
from lora_kernels.adapters.files import read_pickle, write_pickle

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def tensors():
    return {
        **{f"{dtype}": (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES},
        "number": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.ones(3).half(),
        "more": torch.randn(7), "bytes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip


def assert_same(one, other):
    assert set(one) == set(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert torch.equal(value, other[key]), key


def test_files_of_safetensors_are_read_as_by_their_package(tmp_path, seed):
    save_file(tensors(), tmp_path / "a.safetensors", {"format": "pt"})
    found, metadata = mapped.map_safetensors(tmp_path / "a.safetensors")
    assert_same(found, load_file(tmp_path / "a.safetensors"))
    assert metadata == {"format": "pt"}
    mapped.release()
    assert_same(found, load_file(tmp_path / "a.safetensors"))


def test_pickles_are_mapped_bit_for_bit(tmp_path, seed):
    whole = torch.randn(6, 10)
    state = {key: value for key, value in tensors().items() if value.numel()}
    state |= {"t": whole.T, "part": whole[1:4, ::2], "row": whole[2]}
    torch.save(state, tmp_path / "a.pt")
    loaded = read_pickle(tmp_path / "a.pt")
    found = mapped.map_pickle(tmp_path / "a.pt", loaded)
    assert all(found[key] is not value for key, value in loaded.items())
    assert_same(found, state)
    mapped.release()
    assert_same(found, state)
    assert {key: value.stride() for key, value in found.items()} == {
        key: value.stride() for key, value in loaded.items()
    }


def test_pickles_that_hold_more_are_left_as_they_are(tmp_path, seed):
    torch.save({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / "a.pt")
    loaded = read_pickle(tmp_path / "a.pt")
    found = mapped.map_pickle(tmp_path / "a.pt", {"b": loaded["b"]})
    assert found["b"] is loaded["b"]
    torch.save({"a": torch.ones(3)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    loaded = read_pickle(tmp_path / "b.pt")
    assert mapped.map_pickle(tmp_path / "b.pt", loaded)["a"] is loaded["a"]


def test_files_are_written_as_by_their_package(tmp_path, seed):
    state = tensors()
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    mapped.write_safetensors(tmp_path / "b.safetensors", state, {"format": "pt"})
    assert_same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    with pytest.raises(FileExistsError):
        mapped.write_safetensors(tmp_path / "b.safetensors", state, {})


def test_views_are_written_as_what_they_show(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(mapped, "_PIECE", 8)  # several pieces
    whole = torch.randn(6, 10)
    views = {"t": whole.T, "part": whole[1:4, ::2], "same": whole, "row": whole[2], "": whole[:, 3]}
    mapped.write_safetensors(tmp_path / "a.safetensors", views, {})
    assert_same(load_file(tmp_path / "a.safetensors"), views)
    write_pickle(tmp_path / "a.pt", dict(views))
    assert_same(read_pickle(tmp_path / "a.pt"), views)


def test_a_pickle_holds_no_more_than_the_tensors_show(tmp_path):
    write_pickle(tmp_path / "a.pt", {"row": torch.zeros(4096, 64)[7]})
    assert (tmp_path / "a.pt").stat().st_size < 4096


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_one_number_that_is_not_finite_is_found(value, place, monkeypatch):
    monkeypatch.setattr(mapped, "_PIECE", 4)
    x = torch.ones(3, 6)
    assert mapped.is_finite(x)
    assert mapped.is_finite(x.T)
    x.view(-1)[place] = value
    assert not mapped.is_finite(x)
    assert not mapped.is_finite(x.T)
    assert mapped.is_finite(torch.empty(0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_a_conversion_takes_a_fraction_of_the_files_size(tmp_path):
    code = """
import json, sys, torch
from lora_kernels.cli import main
from lora_kernels.cli.convert import convert
from lora_kernels.adapters import mapped

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

name = "layers.{}.q_proj.lora_{}"
tensors = {name.format(i, x): torch.zeros(*s) for i in range(12)
           for x, s in (("a", (60000, 16)), ("b", (16, 60000)))}
mapped.write_safetensors(mapped.Path("mlx/adapters.safetensors"), tensors, {})
size = mapped.Path("mlx/adapters.safetensors").stat().st_size
del tensors
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
assert main(["convert", "mlx", "peft"]) == 0
print(json.dumps([size, peak() - before]))
"""
    (tmp_path / "mlx").mkdir()
    told = {"fine_tune_type": "lora", "lora_parameters": {"rank": 16, "scale": 1.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(told))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    size, taken = json.loads(done.stdout.splitlines()[-1])
    assert size > 90e6
    assert taken < 0.75 * size  # of a larger file it is a smaller part
