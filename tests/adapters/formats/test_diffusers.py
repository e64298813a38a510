"""diffusers' file: the header, components of a pipeline, and files without either."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.diffusers import read, write
from lora_kernels.cli import main
from tests.adapters.formats import made
from tests.adapters.formats.environments import run
from tests.adapters.nets import assert_same

TO_Q, TO_K = (f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk")
SIZES = {TO_Q: (8, 8), TO_K: (12, 8)}


def factors(front="", r=2, **more):
    tensors = {}
    for path, (inputs, outputs) in SIZES.items():
        tensors[f"{front}{path}.lora_A.weight"] = torch.randn(r, inputs)
        tensors[f"{front}{path}.lora_B.weight"] = torch.randn(outputs, r)
    return tensors | more


def read_directory(folder, hints=Hints()):  # noqa: B008
    name, file = locate(folder)
    assert name == "diffusers"
    return read(file, hints)


def save(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    metadata = {"format": "pt"}
    if config is not None:
        metadata["lora_adapter_metadata"] = json.dumps(config)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
    return folder


def config(front="", **options):
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"], **options}
    return {front + key: value for key, value in told.items()}


@pytest.mark.parametrize("front", ["", "unet.", "transformer."])
def test_the_header_tells_the_scaling_and_the_only_component_goes(tmp_path, seed, front):
    told = config(front, alpha_pattern={"to_k": 5}, use_rslora=True, lora_dropout=0.1)
    adapter = read_directory(save(tmp_path / "a", factors(front), told))
    assert list(adapter.layers) == [TO_K, TO_Q]
    assert adapter.layers[TO_Q].spec.scaling == 6 / 2**0.5
    assert adapter.layers[TO_K].spec.scaling == 5 / 2**0.5
    assert adapter.layers[TO_Q].spec.lora_dropout == 0.1
    assert len(adapter.notes) == bool(front)


def test_two_components_keep_their_names_and_numbers(tmp_path, seed):
    encoder = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = factors("unet.") | {
        f"text_encoder.{encoder}.lora_A.weight": torch.randn(3, 6),
        f"text_encoder.{encoder}.lora_B.weight": torch.randn(6, 3),
    }
    told = config("unet.") | config("text_encoder.", r=3, lora_alpha=1)
    adapter = read_directory(save(tmp_path / "a", tensors, told))
    assert {path: layer.spec.scaling for path, layer in adapter.layers.items()} == {
        f"unet.{TO_Q}": 3.0, f"unet.{TO_K}": 3.0, f"text_encoder.{encoder}": 1 / 3
    }  # fmt: skip
    write(adapter, tmp_path / "b", Hints())
    again = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    assert set(again) == set(tensors)
    made.assert_same_layers(read_directory(tmp_path / "b"), adapter)


def test_without_header_alpha_is_in_the_file_or_a_hint(tmp_path, seed):
    save(tmp_path / "a", factors())
    with pytest.raises(ValueError, match=r"to_k\.alpha: missing, r is \d: give --lora-alpha"):
        read_directory(tmp_path / "a")
    adapter = read_directory(tmp_path / "a", Hints(lora_alpha=6.0))
    assert adapter.layers[TO_Q].spec.scaling == 3.0
    alphas = {f"{path}.alpha": torch.tensor(5.0) for path in SIZES}
    adapter = read_directory(save(tmp_path / "b", factors() | alphas))
    assert adapter.layers[TO_Q].spec.scaling == 2.5


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"lora_dropout": 0.25}], ids=str)
def test_what_was_written_is_read_bit_for_bit(tmp_path, seed, options):
    adapter = made.with_scaling(made.adapter(SIZES, **options), TO_K, 0.7)
    lines = write(adapter, tmp_path / "a", Hints())
    assert "prefix=None" in lines[1]
    made.assert_same_layers(read_directory(tmp_path / "a"), adapter)


def test_a_rank_that_differs_from_the_header_is_named(tmp_path, seed):
    save(tmp_path / "a", factors(r=3), config())
    with pytest.raises(ValueError, match=r"to_k\.lora_A\.weight: rank 3, .* says 2"):
        read_directory(tmp_path / "a")


def test_a_file_may_have_another_name(tmp_path, seed):
    write(made.adapter(SIZES), tmp_path / "mine.safetensors", Hints())
    assert locate(tmp_path / "mine.safetensors")[0] == "diffusers"
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["r"], told["lora_alpha"]) == (2, 6)


def test_paths_with_and_without_a_component_are_refused(tmp_path, seed):
    mixed = made.adapter({f"unet.{TO_Q}": (8, 8), TO_K: (8, 8)})
    with pytest.raises(ValueError, match="some paths begin with"):
        write(mixed, tmp_path / "a", Hints())
    assert not (tmp_path / "a").exists()


def test_embeddings_are_refused(tmp_path, seed):
    adapter = made.adapter({}, embedding=True)
    with pytest.raises(
        ValueError, match=r"embed_tokens: diffusers's format has no LoRA .* 'embedding'"
    ):
        write(adapter, tmp_path / "a", Hints())


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.formats
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "conv1", "conv2"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "use_rslora": True,
         "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 3}},
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k"], "use_dora": True},
    ],
    ids=str,
)  # fmt: skip
def test_diffusers_computes_the_same(tmp_path, options):
    script = ("diffusers", "diffusers_unet.py")
    run(*script, "train", tmp_path, json.dumps(options))
    expected = load_file(tmp_path / "y.safetensors")["y"]

    def computed(how, folder):
        run(*script, how, tmp_path, tmp_path / folder, tmp_path / "z.safetensors")
        return load_file(tmp_path / "z.safetensors")["y"]

    convert(tmp_path / "theirs", tmp_path / "peft")
    assert_same(computed("peft", "peft"), expected, torch.float32)
    convert(tmp_path / "peft", tmp_path / "again", "--to", "diffusers")
    assert_same(computed("run", "again"), expected, torch.float32)
    kohya = tmp_path / "kohya.safetensors"
    convert(tmp_path / "theirs", kohya, "--to", "kohya")
    convert(kohya, tmp_path / "back", "--to", "diffusers", "--base", tmp_path / "base")
    name = "pytorch_lora_weights.safetensors"
    theirs = load_file(tmp_path / "theirs" / name)
    for folder in ("again", "back"):
        ours = load_file(tmp_path / folder / name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
