"""Loading by name or path: errors in one line."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from examples.errors import InputError
from examples.finetune import model as finetune
from examples.pretrained import from_pretrained, whole_model


def test_what_is_there_is_loaded(tiny_model):
    assert from_pretrained(AutoModel, tiny_model).config.hidden_size == 64


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        (AutoModel, lambda folder: cut_in_half(folder / "model.safetensors")),
        (AutoConfig, lambda folder: cut_in_half(folder / "config.json")),
        (AutoModel, lambda folder: (folder / "model.safetensors").unlink()),
        (AutoConfig, shutil.rmtree),
    ],
    ids=["cut weights", "cut configuration", "no weights", "nothing"],
)
def test_what_is_damaged_is_named_in_one_line(tiny_model, tmp_path, kind, damage):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(InputError, match=f"--model {folder}: .") as error:
        from_pretrained(kind, str(folder))
    assert "\n" not in str(error.value)


def test_other_shapes_than_the_models_are_named_in_one_line(tiny_model):
    with pytest.raises(InputError, match=rf"^--model {tiny_model}: ."):
        from_pretrained(AutoModel, tiny_model, intermediate_size=96)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def load(location):
        raise ImportError("needs sentencepiece")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(InputError, match="--model some/name: needs sentencepiece"):
        from_pretrained(AutoTokenizer, "some/name")


@pytest.fixture
def without(tiny_model, tmp_path):
    """without(key): a copy of the tiny BERT that lacks this tensor."""

    def build(key: str) -> str:
        folder = tmp_path / "incomplete"
        shutil.copytree(tiny_model, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return build


def test_what_is_missing_besides_the_head_is_named(without):
    location = without("pooler.dense.bias")
    load = functools.partial(whole_model, AutoModelForSequenceClassification, location)
    first = r"--model .*: 1 weights of a BertForSequenceClassification .* bert\.pooler\.dense\.bias"
    with pytest.raises(InputError, match=first):
        load(lambda model: ["classifier"])
    with pytest.raises(InputError, match=r": 3 weights .* bert\.pooler"):
        load()
    assert load(lambda model: ["classifier", "bert.pooler"]).dtype == torch.float32


def test_a_head_that_gives_way_is_named(tiny_model, tmp_path, capsys):
    load = functools.partial(whole_model, AutoModelForSequenceClassification)
    load(tiny_model, lambda model: ["classifier"]).save_pretrained(tmp_path)
    assert capsys.readouterr().err == ""  # it had none
    load(str(tmp_path), lambda model: ["classifier"], num_labels=3)
    assert capsys.readouterr().err == (
        f"--model {tmp_path}: drawn anew, since it has another shape: classifier.bias, "
        "classifier.weight\n"
    )


def test_the_finetuning_example_trains_no_random_body(without):
    location = without("encoder.layer.1.output.dense.weight")
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        finetune.load_model(location, 2, finetune.load_tokenizer(location), 0)
