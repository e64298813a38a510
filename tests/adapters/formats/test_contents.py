"""Formats are told by the content of files, whatever they are called."""

import os

import pytest
import torch
from safetensors.torch import save_file

from lora_kernels.adapters.formats import locate, recognise
from lora_kernels.adapters.formats.contents import candidates, look

# The keys of one layer in each format of safetensors, and in each of pickles.
SAFETENSORS = {
    "mlx": ("a.lora_a", "a.lora_b"),
    "kohya": ("lycoris_a.lora_down.weight", "lycoris_a.lora_up.weight", "lycoris_a.alpha"),
    "diffusers": ("a.lora_A.weight", "a.lora_B.weight"),
    "torchtune": ("a.lora_a.weight", "a.lora_b.weight"),
}
PICKLES = {
    "torchtune": ("a.lora_a.weight", "a.lora_b.weight"),
    "kohya": ("lycoris_a.lora_down.weight", "lycoris_a.lora_up.weight"),
    "litgpt": ("transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"),
    "loralib": ("a.lora_A", "a.lora_B"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_are_told_by_their_keys(name, tmp_path):
    save_file({key: torch.ones(1) for key in SAFETENSORS[name]}, tmp_path / "whatever.bin")
    assert look(tmp_path / "whatever.bin").kind == "safetensors"
    assert recognise(tmp_path / "whatever.bin") == name


@pytest.mark.parametrize("envelope", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_told_by_their_keys(name, envelope, tmp_path):
    state = {key: torch.ones(1) for key in PICKLES[name]}
    torch.save({"model": state} if envelope else state, tmp_path / "whatever.safetensors")
    assert look(tmp_path / "whatever.safetensors").kind == "pickle"
    assert recognise(tmp_path / "whatever.safetensors") == name


LORALIBS = (
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.attn.q_proj",
)


@pytest.mark.parametrize("more", ["model.layers.0.self_attn.q_proj", *LORALIBS, "a"])
def test_loralibs_files_with_names_like_litgpts_are_loralibs(more, tmp_path):
    paths = (more, "lm_head") if more not in LORALIBS else (more,)
    keys = [f"{path}.{name}" for path in paths for name in ("lora_A", "lora_B")]
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "lora.pt")
    assert recognise(tmp_path / "lora.pt") == "loralib"


def test_safetensors_of_something_else_are_refused(tmp_path):
    save_file({"model.embed_tokens.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: must be in one of these formats"):
        recognise(tmp_path / "model.safetensors")


def test_names_of_tools_come_before_others_in_a_directory(tmp_path):
    for name in ("adapters.safetensors", "0000100_adapters.safetensors", "more.pt", "notes.txt"):
        save_file({key: torch.ones(1) for key in SAFETENSORS["mlx"]}, tmp_path / name)
    assert candidates(tmp_path) == [tmp_path / "adapters.safetensors"]
    assert locate(tmp_path) == ("mlx", tmp_path / "adapters.safetensors")
    (tmp_path / "adapters.safetensors").unlink()
    assert len(candidates(tmp_path)) == 2
    with pytest.raises(ValueError, match="holds several adapters"):
        locate(tmp_path)


def test_pefts_pickle_beside_its_safetensors_is_no_second_adapter(tmp_path):
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert candidates(tmp_path) == [tmp_path / "adapter_model.safetensors"]
    assert recognise(tmp_path) == "peft"


def test_a_directory_without_anything_is_pefts(tmp_path):
    """So that its reader names the files that are missing."""
    assert locate(tmp_path) == ("peft", tmp_path)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):  # Windows
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors: must be a file or a directory"):
        recognise(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("size", [4, 1 << 40, (1 << 64) - 1])
def test_damaged_safetensors_are_called_damaged(size, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + b'{"a":{}}')
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged, or not a safetensors file"):
        recognise(tmp_path / "x.safetensors")
