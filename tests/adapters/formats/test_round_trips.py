"""PEFT -> another format -> PEFT, by the command: bit for bit if the format holds the adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.adapters.formats import FORMATS, peft, recognise
from lora_kernels.cli import main
from tests.adapters.formats import made

NAMES = [name for name in FORMATS if name != "peft"]
# What a format's file must be called, if it is no directory.
SUFFIXES = {"gguf": ".gguf", "kohya": ".safetensors", "loralib": ".pt"}
# The formats whose files have these things, too; others are lossless without.
DORA = ("diffusers", "kohya", "mlx", "torchtune")
ATTENTION = [path for path in made.LINEARS if path.endswith(("q_proj", "k_proj", "v_proj"))]
SCALINGS = ("diffusers", "kohya", "loralib")


@pytest.fixture
def base(tmp_path):
    return made.write_config(tmp_path / "base")


def there_and_back(name, adapter, base, folder, capsys):
    """The tensors before and after, and what the commands said."""
    if name == "gguf":
        pytest.importorskip("gguf")
    peft.write(adapter, folder / "one")
    other = folder / f"other{SUFFIXES.get(name, '')}"
    flags = ["--base", str(base)]
    assert main(["convert", str(folder / "one"), str(other), "--to", name, *flags]) == 0
    assert recognise(other) == name
    assert main(["convert", str(other), str(folder / "two"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    weights = "adapter_model.safetensors"
    return load_file(folder / "one" / weights), load_file(folder / "two" / weights), lines


def assert_same(one, two, folder, lines):
    assert set(one) == set(two)
    for key, value in one.items():
        assert two[key].dtype == value.dtype
        assert torch.equal(two[key], value), key
    numbers = []
    for name in ("one", "two"):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        keys = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        numbers.append([config[key] for key in keys])
    assert numbers[0] == numbers[1]
    assert not [line for line in lines if line.startswith("remark") and "litgpt" not in line
                and "prefix=None" not in line]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_linears_of_one_rank_come_back(name, dtype, base, tmp_path, seed, capsys):
    left = ("o_proj", "gate_proj") if name == "adapterhub" else ()
    sizes = {p: s for p, s in made.LINEARS.items() if not left or not p.endswith(left)}
    adapter = made.adapter(sizes, dtype=dtype)
    one, two, lines = there_and_back(name, adapter, base, tmp_path, capsys)
    assert_same(one, two, tmp_path, lines)


@pytest.mark.parametrize("name", DORA)
def test_magnitudes_come_back(name, base, tmp_path, seed, capsys):
    adapter = made.adapter(dora=True)
    one, two, lines = there_and_back(name, adapter, base, tmp_path, capsys)
    assert any("magnitude" in key for key in one)
    assert_same(one, two, tmp_path, lines)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DORA])
def test_magnitudes_are_refused_by_the_others(name, base, tmp_path, seed, capsys):
    peft.write(made.adapter(dora=True), tmp_path / "one")
    other = str(tmp_path / f"other{SUFFIXES.get(name, '')}")
    if name == "gguf":
        pytest.importorskip("gguf")
    arguments = [str(tmp_path / "one"), other, "--to", name, "--base", str(base)]
    assert main(["convert", *arguments]) == 2
    assert "use_dora" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "one"]


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_and_ranks_of_their_own_come_back(name, base, tmp_path, seed, capsys):
    adapter = made.with_rank(made.adapter(r=4), ATTENTION[0], 2)
    adapter = made.with_scaling(adapter, ATTENTION[1], 0.25)
    one, two, lines = there_and_back(name, adapter, base, tmp_path, capsys)
    assert_same(one, two, tmp_path, lines)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCALINGS])
def test_scalings_and_ranks_of_their_own_go_into_the_factors(name, base, tmp_path, seed, capsys):
    adapter = made.adapter({path: made.LINEARS[path] for path in ATTENTION}, r=4)
    adapter = made.with_rank(adapter, ATTENTION[0], 2)
    adapter = made.with_scaling(adapter, ATTENTION[1], 3.0)  # twice the others'
    one, two, lines = there_and_back(name, adapter, base, tmp_path, capsys)
    assert any(line.startswith("remark") for line in lines)
    first = peft.read(tmp_path / "one")
    again = peft.read(tmp_path / "two")
    for path, layer in first.layers.items():
        assert torch.equal(made.update(again.layers[path]), made.update(layer))
    assert set(one) == set(two)


@pytest.mark.parametrize("name", ["gguf", "mlx"])
def test_embeddings_come_back(name, base, tmp_path, seed, capsys):
    adapter = made.adapter(embedding=True)
    one, two, lines = there_and_back(name, adapter, base, tmp_path, capsys)
    assert any("lora_embedding_A" in key for key in one)
    assert_same(one, two, tmp_path, lines)
