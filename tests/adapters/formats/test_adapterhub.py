"""AdapterHub's directory: its config, c_attn, and the files of older versions."""

import json

import pytest
import torch

from lora_kernels.adapters.formats import locate
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.adapterhub import read, write
from lora_kernels.spec import OutputSplits
from tests.adapters.formats import made

QUERY, VALUE = (f"encoder.layer.0.attention.self.{name}" for name in ("query", "value"))
BERT = {QUERY: (8, 8), VALUE: (8, 8), "encoder.layer.0.output.dense": (12, 8)}


def save(folder, tensors=None, version="adapters.1.3.0", **config):
    folder.mkdir(exist_ok=True)
    if tensors is None:
        tensors = {
            f"{path}.loras.task.lora_{x}": torch.randn(*shape)
            for path, (inputs, outputs) in BERT.items()
            for x, shape in (("A", (2, inputs)), ("B", (outputs, 2)))
        }
    torch.save(tensors, folder / "pytorch_adapter.bin")
    told = {
        "alpha": 6, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add",
        "dropout": 0.0, "r": 2, "use_gating": False, "use_dora": False, **config,
    }  # fmt: skip
    text = json.dumps({"config": told, "version": version, "model_name": "some/bert"})
    (folder / "adapter_config.json").write_text(text)
    return tensors


def read_directory(folder, hints=Hints()):  # noqa: B008
    name, file = locate(folder)
    assert name == "adapterhub"
    return read(file, hints)


def test_factors_are_pefts_and_alpha_is_divided_by_r(tmp_path, seed):
    tensors = save(tmp_path)
    adapter = read_directory(tmp_path)
    assert set(adapter.layers) == set(BERT)
    assert torch.equal(adapter.layers[QUERY].lora_A, tensors[f"{QUERY}.loras.task.lora_A"])
    assert adapter.layers[QUERY].spec.scaling == 3.0
    assert adapter.base_model == "some/bert"
    assert adapter.source.place(f"{QUERY}.lora_B").endswith(f"{QUERY}.loras.task.lora_B")


@pytest.mark.parametrize(("version", "scaling"), [("1.0.1", 1.0), ("1.1.0", 3.0), ("2.0.0", 3.0)])
def test_files_of_older_versions_multiply_by_one(tmp_path, seed, version, scaling):
    save(tmp_path, version=f"adapters.{version}")
    adapter = read_directory(tmp_path)
    assert adapter.layers[QUERY].spec.scaling == scaling
    assert len(adapter.notes) == (scaling == 1.0)


@pytest.mark.parametrize("matrices", [["q", "v"], ["k"], ["q", "k", "v"]], ids="".join)
def test_c_attn_is_a_merged_linear(tmp_path, seed, matrices):
    count = len(matrices)
    tensors = {
        "h.0.attn.c_attn.loras.task.lora_A": torch.randn(2 * count, 8),
        "h.0.attn.c_attn.loras.task.lora_B": torch.randn(6 * count, 2),
    }
    save(tmp_path / "a", tensors, attn_matrices=matrices)
    (layer,) = read_directory(tmp_path / "a").layers.values()
    enabled = tuple(letter in matrices for letter in "qkv")
    assert layer.spec.splits == OutputSplits((6, 6, 6), enabled)
    assert (layer.base.inputs, layer.base.outputs, layer.spec.scaling) == (8, 18, 3.0)
    write(read_directory(tmp_path / "a"), tmp_path / "b", Hints())
    again = torch.load(tmp_path / "b" / "pytorch_adapter.bin", weights_only=True)
    assert all(torch.equal(v, again[k.replace("task", "adapter")]) for k, v in tensors.items())


def test_what_was_written_is_read_bit_for_bit(tmp_path, seed):
    adapter = made.adapter(BERT, lora_dropout=0.25)
    assert len(write(adapter, tmp_path / "a", Hints())) == 1
    again = read_directory(tmp_path / "a")
    made.assert_same_layers(again, adapter)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]
    places = {"selfattn_lora": True, "intermediate_lora": False, "output_lora": True}
    assert {key: config[key] for key in places} == places
    assert (config["attn_matrices"], config["r"], config["alpha"]) == (["q", "v"], 2, 6)


@pytest.mark.parametrize(
    "path", ["encoder.layer.0.attention.output.dense", "model.layers.0.self_attn.o_proj"]
)
def test_other_places_are_refused(tmp_path, seed, path):
    with pytest.raises(ValueError, match="AdapterHub has LoRA of q, k, v and of the MLP only"):
        write(made.adapter({path: (8, 8)}), tmp_path / "a", Hints())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"composition_mode": "scale", "r": 1}, "composition_mode"),
        ({"use_gating": True}, "use_gating"), ({"use_dora": True}, "use_dora"),
        ({"vera_d": 0.1}, "vera_d"), ({"architecture": "prefix_tuning"}, "architecture"),
        ({"r": 0}, "r: must be"), ({"alpha": None}, "alpha: missing"),
        ({"attn_matrices": ["o"]}, "attn_matrices"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_lora_is_refused_by_name(tmp_path, seed, config, named):
    save(tmp_path, **config)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: config: {named}"):
        read_directory(tmp_path)
