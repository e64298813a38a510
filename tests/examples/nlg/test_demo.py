"""The demonstration from end to end, on the tiny vocabulary and for a few steps."""

import json
from argparse import Namespace

from examples.nlg import data, demo, metrics
from examples.nlg.decode import Search, read_predictions
from examples.nlg.train import Settings

PLAN = demo.Plan(
    width=32, layers=2, heads=2,
    pretraining=Settings(epochs=2, batch_size=8, lr=1e-2, warmup=2, label_smoothing=0.0, seed=110),
    adaptation=Settings(epochs=6, batch_size=4, lr=2e-2, warmup=2, seed=110),
    search=Search(beams=2, new_tokens=8, max_length=120),
    max_length=120,
)  # fmt: skip


def test_it_measures_before_and_after_and_checks_itself(
    restaurants, tiny_gpt2, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("shutil.which", lambda name: None)  # METEOR has a test of its own
    options = Namespace(output=tmp_path, vocabulary=tiny_gpt2, device="auto")
    assert demo.run(options, restaurants, PLAN) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"]
    assert set(result["checks"].values()) == {0}
    assert result["trainable_parameters"] == 1024
    assert result["tokens_per_second"] > 0
    assert result["before"]["scores"]["METEOR"] == {
        "reason": "FileNotFoundError: java is not installed"
    }

    groups, predictions = read_predictions(tmp_path / "after.jsonl")
    _, held = data.split_by_context(restaurants, 0.1, demo.SEED)
    assert groups == data.group(held)
    assert predictions == result["after"]["predictions"]
    printed = capsys.readouterr().out
    for label in ("2 of 24 contexts held out", "loss", "BLEU", "tokens/s", "ok: unmerged"):
        assert label in printed


def test_a_metric_may_be_missing_on_one_side_only(capsys):
    before, after = (
        {"loss": 1.0, "scores": {"METEOR": value}} for value in (5.0, metrics.Missing("it died"))
    )
    demo._report(before, after, {}, 1.0)
    assert "METEOR            5.00 missing: it died\n" in capsys.readouterr().out


def test_pretraining_never_has_a_text_behind_a_context(tokenizer, restaurants):
    (row,) = demo._documents(tokenizer, restaurants[:1], 120)
    end, example = tokenizer.eos_token, restaurants[0]
    assert tokenizer.decode(row["input_ids"]) == (
        f"{end} {example.completion}{end}{example.context}{end}"
    )
    assert row["labels"] == row["input_ids"]
