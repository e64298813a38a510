"""lora-kernels inspect: what is in a file of each format, and what is suspicious."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters.formats import FORMATS
from lora_kernels.cli import main
from tests.adapters.formats import made

ATTENTION = {p: s for p, s in made.LINEARS.items() if p.endswith(("q_proj", "k_proj", "v_proj"))}
FILES = {"gguf": "a.gguf", "kohya": "a.safetensors", "loralib": "a.pt"}


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Runs inspect in tmp_path: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main(["inspect", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_shown(inspect, tmp_path, seed, name):
    if name == "gguf":
        pytest.importorskip("gguf")
    base = made.write_config(tmp_path / "base")
    path = tmp_path / FILES.get(name, "a")
    FORMATS[name].write(made.adapter(ATTENTION), path, made.HINTS)
    code, out, err = inspect(path, "--json", "--base", base)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["format"] == name
    assert found["suspicious"] == []
    assert {(row["name"], row["count"], row["r"], row["scaling"], row["inputs"], row["outputs"])
            for row in found["rows"]} == {
        ("q_proj", 2, 2, 3.0, 16, 16), ("k_proj", 2, 2, 3.0, 16, 8), ("v_proj", 2, 2, 3.0, 16, 8)
    }  # fmt: skip
    code, out, _ = inspect(path, "--base", base)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}: {name}, 0.00")
    assert any(line.split() == ["q_proj", "2", "linear", "16", "16", "2", "3", "float32"]
               for line in lines)  # fmt: skip
    assert not any("suspicious" in line for line in lines)


def suspicious(inspect, path, *options):
    code, out, _ = inspect(path, "--json", *options)
    assert code == 0
    return json.loads(out)["suspicious"]


def test_untrained_factors_are_suspicious(inspect, tmp_path, seed):
    adapter = made.adapter(ATTENTION)
    for layer in list(adapter.layers.values())[:2]:
        layer.lora_B.zero_()
    FORMATS["mlx"].write(adapter, tmp_path / "a", made.HINTS)
    (line,) = suspicious(inspect, "a")
    assert line.startswith("no update, as before training, in 2 of 6 layers: model.layers.0.")


@pytest.mark.parametrize("alpha", [0.0, -6.0])
def test_scalings_that_are_not_positive_are_suspicious(inspect, tmp_path, seed, alpha):
    FORMATS["mlx"].write(made.adapter(ATTENTION, alpha=alpha), tmp_path / "a", made.HINTS)
    (line,) = suspicious(inspect, "a")
    assert line.startswith("scaling is not positive in 6 layers: model.layers.0.")


@pytest.mark.parametrize("name", ["mlx", "peft", "kohya"])
def test_numbers_that_are_not_finite_are_suspicious(inspect, tmp_path, seed, name):
    path = tmp_path / FILES.get(name, "a")
    FORMATS[name].write(made.adapter(ATTENTION), path, made.HINTS)
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    tensors = load_file(file)
    key = next(key for key in tensors if "q_proj" in key and "alpha" not in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)
    assert f"{key}: holds NaN or infinite values" in suspicious(inspect, path)


def test_ranks_that_differ_from_the_config_are_suspicious(inspect, tmp_path, seed):
    made.mlx(tmp_path / "a", lora_parameters={"rank": 8, "scale": 1.0})
    (line,) = suspicious(inspect, "a")
    assert "has rank 2" in line
    assert "says 8" in line


def test_a_scaling_that_no_file_tells_is_shown_so(inspect, tmp_path, seed):
    FORMATS["torchtune"].write(made.adapter(ATTENTION), tmp_path / "a", made.HINTS)
    (tmp_path / "a" / "adapter_config.json").unlink()
    base = made.write_config(tmp_path / "base")
    code, out, _ = inspect("a", "--base", base)
    assert code == 0
    assert "not told" in out
    assert "suspicious: a/adapter_model.pt: no adapter_config.json beside it tells" in out


def test_names_of_no_plain_model_are_suspicious(inspect, tmp_path, seed):
    odd = made.adapter({"default.base_layer": (4, 4), "lin": (4, 4)})
    FORMATS["mlx"].write(odd, tmp_path / "a", made.HINTS)
    (line,) = suspicious(inspect, "a")
    assert line == "1 names that no plain model has: default.base_layer"


def test_blocks_that_lack_a_layer_are_suspicious(inspect, tmp_path, seed):
    sizes = {p: s for p, s in made.LINEARS.items() if "layers.1.mlp.up" not in p}
    FORMATS["mlx"].write(made.adapter(sizes), tmp_path / "a", made.HINTS)
    (line,) = suspicious(inspect, "a")
    assert line == "model.layers.N.mlp.up_proj: not in block 1"


def test_layers_that_the_base_lacks_are_suspicious(inspect, tmp_path, seed):
    FORMATS["mlx"].write(made.adapter(ATTENTION), tmp_path / "a", made.HINTS)
    base = made.write_config(tmp_path / "base")
    weights = {f"{path}.weight": torch.ones(1) for path in list(ATTENTION)[1:]}
    save_file(weights, base / "model.safetensors")
    (line,) = suspicious(inspect, "a", "--base", base)
    assert line.startswith("1 layers are not in ")
    assert line.endswith("model.layers.0.self_attn.q_proj")


def test_other_entries_and_dora_are_shown(inspect, tmp_path, seed):
    adapter = made.adapter(ATTENTION, dora=True)
    entries = {"head.weight": torch.ones(2, 2)}
    adapter = dataclasses.replace(adapter, entries=entries, modules_to_save=["head"])
    FORMATS["peft"].write(adapter, tmp_path / "a", made.HINTS)
    code, out, _ = inspect("a")
    assert code == 0
    assert "also: head.weight" in out
    assert "linear, DoRA" in out


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "a.bin: is empty"), (b"no", "a.bin"), (b"GGUF", "a.bin"), (None, "no such file")],
)
def test_what_is_no_adapter_is_one_line(inspect, tmp_path, content, named):
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    code, out, err = inspect("a.bin")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_a_directory_without_weights_is_told_what_they_are_called(inspect, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, out, err = inspect("a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "adapter_model.safetensors" in err
