"""Beam search, files of predictions, and the commands from training to scores."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import lora_kernels as lora
from examples import plots
from examples.errors import InputError
from examples.finetune.model import set_merging
from examples.nlg import data
from examples.nlg.__main__ import main
from examples.nlg.decode import (
    Search,
    _NoRepeatInCompletion,
    decode,
    read_predictions,
    write_predictions,
)
from examples.nlg.model import add_lora, load_model

SEARCH = Search(beams=4, new_tokens=12, batch_size=3)


@pytest.fixture(scope="module")
def groups(restaurants):
    return data.group(restaurants)[::3]  # names of one to three tokens: unequal lengths


@pytest.fixture
def adapted(tiny_gpt2):
    """In float64: beams do not change places by rounding."""
    torch.manual_seed(3)
    model = add_lora(load_model(tiny_gpt2), rank=4, alpha=32, dropout=0.0)
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_attn.lora_B, std=0.2)
    return model.double().eval()


def test_the_defaults_are_those_of_the_issue():
    assert vars(Search()) == {
        "beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "new_tokens": 64,
        "max_length": 512, "batch_size": 16,
    }  # fmt: skip


def test_batched_with_padding_is_one_at_a_time(adapted, tokenizer, groups):
    lengths = {len(tokenizer(item.context)["input_ids"]) for item in groups}
    assert len(lengths) > 1
    together = decode(adapted, tokenizer, groups, SEARCH)
    alone = [decode(adapted, tokenizer, [item], SEARCH)[0] for item in groups]
    assert together == alone
    assert len(set(together)) > 1


def test_merged_is_unmerged(adapted, tokenizer, groups):
    assert adapted.transformer.h[0].attn.c_attn.merged
    merged = decode(adapted, tokenizer, groups, SEARCH)
    assert decode(set_merging(adapted, False), tokenizer, groups, SEARCH) == merged
    assert not adapted.transformer.h[0].attn.c_attn.merged


def test_an_adapter_loaded_onto_the_base_decodes_as_the_trained_model(
    adapted, tokenizer, groups, tiny_gpt2, tmp_path
):
    """The original's decoding reads the checkpoint's LoRA alone, onto a random base."""
    base = load_model(tiny_gpt2).double().eval()
    before = decode(base, tokenizer, groups, SEARCH)
    lora.save_adapter(adapted, tmp_path)
    loaded = lora.load_adapter(load_model(tiny_gpt2), tmp_path).double().eval()
    expected = decode(adapted, tokenizer, groups, SEARCH)
    assert decode(loaded, tokenizer, groups, SEARCH) == expected
    assert expected != before


def test_a_wider_beam_finds_no_less_likely_text(adapted, tokenizer, groups):
    def likelihood(text: str) -> float:
        context = [*tokenizer(groups[0].context)["input_ids"], tokenizer.eos_token_id]
        tokens = torch.tensor([context + tokenizer(text)["input_ids"]])
        scores = adapted(tokens).logits[0, len(context) - 1 : -1].log_softmax(-1)
        return float(scores.gather(1, tokens[0, len(context) :, None]).sum())

    plain = {"new_tokens": 4, "length_penalty": 0.0, "no_repeat_ngram": 0}
    with torch.no_grad():
        narrow, wide = (
            likelihood(decode(adapted, tokenizer, groups[:1], Search(beams=n, **plain))[0])
            for n in (1, 330)
        )
    assert wide >= narrow


def test_four_words_come_once_in_a_completion_but_may_be_copied_from_the_context():
    ban = _NoRepeatInCompletion(4, width=5)
    context = [1, 2, 3, 4, 0]
    copied = torch.tensor([[*context, 1, 2, 3]])
    scores = torch.zeros(1, 10)
    assert torch.equal(ban(copied, scores), scores)
    repeated = torch.tensor([[*context, 5, 6, 7, 8, 5, 6, 7]])
    assert ban(repeated, scores)[0].isinf().nonzero().flatten().tolist() == [8]


def test_a_completion_ends_at_a_blank_line(tokenizer, groups, monkeypatch):
    class Model:
        device = "cpu"

        def generate(self, input_ids, **kwargs):
            text = tokenizer(" One .\n\nTwo")["input_ids"]
            return torch.cat([input_ids, torch.tensor([text] * len(input_ids))], 1)

    assert decode(Model(), tokenizer, groups[:2], SEARCH) == ["One .", "One ."]


def test_predictions_are_read_as_written(groups, tmp_path):
    path = tmp_path / "some" / "predictions.jsonl"
    predictions = [f"Café {i}\u2028." for i in range(len(groups))]
    write_predictions(path, groups, predictions)
    assert read_predictions(path) == (groups, predictions)
    first = json.loads(path.read_text().split("\n")[0])
    assert first == {
        "context": groups[0].context, "references": list(groups[0].references), "category": None,
        "prediction": predictions[0],
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        "[]",
        '{"context": "a", "prediction": "b", "references": []}',
        '{"context": "a", "prediction": "b", "references": ["c", " "]}',
        '{"context": "a", "prediction": "b", "references": [1]}',
        '{"context": "a", "prediction": null, "references": ["c"]}',
    ],
)
def test_a_bad_line_of_predictions_is_named(line, tmp_path):
    """The third of the file: blank lines count."""
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"context": "a", "prediction": "", "references": ["c"]}}\n\n{line}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:3: "):
        read_predictions(path)


def test_train_decode_score(e2e_file, tiny_gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # METEOR has a test of its own
    common = ["--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--max-length", "64"]
    out = tmp_path / "out"
    arguments = [
        "train", *common, "--validation-data", str(e2e_file), "--output", str(out), "--epochs", "3",
        "--lr", "2e-2", "--warmup", "4",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("loss on") == 3
    result = json.loads((out / "results.json").read_text())
    assert (result["status"], len(result["held_out"])) == ("complete", 3)
    assert result["steps"] == len(result["losses"]) == 3 * 6
    assert result["losses"][-1] < result["losses"][0]
    assert result["trainable_parameters"] == 1024
    assert result["tokens_per_second"] > 0
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoints", "curves.png", "epoch-1", "epoch-2", "epoch-3", "results.json",
    }  # fmt: skip
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err

    rows = {}
    for name, extra in (("adapted", ["--adapter", str(out / "adapter")]), ("base", [])):
        path = tmp_path / f"{name}.jsonl"
        options = ["--output", str(path), "--max-length", "120", "--new-tokens", "8", *extra]
        assert main(["decode", *common[:-2], "--beams", "2", *options]) == 0
        assert main(["score", "--task", "e2e", str(path)]) == 0
        assert "java is not installed" in capsys.readouterr().out
        rows[name] = read_predictions(path)
    assert len(rows["base"][0]) == 24
    assert rows["adapted"][1] != rows["base"][1]
    scores = json.loads((tmp_path / "adapted.scores.json").read_text())["all"]
    assert scores["METEOR"] == {"missing": "FileNotFoundError: java is not installed"}
    assert scores["BLEU"] >= 0


@pytest.fixture
def named_adapter(adapted, tiny_gpt2, tmp_path):
    """The folder of an adapter that names tiny_gpt2."""
    lora.save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def decoded(e2e_file, adapter, *more) -> int:
    return main(
        ["decode", "--task", "e2e", "--data", str(e2e_file), "--adapter", str(adapter),
         "--output", str(adapter.parent / "out.jsonl"), "--max-length", "64", "--new-tokens", "2",
         "--beams", "1", *more]
    )  # fmt: skip


@pytest.mark.parametrize("file", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_decode_takes_the_base_model_that_the_adapter_names(
    e2e_file, named_adapter, tiny_gpt2, file, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert decoded(e2e_file, named_adapter / file if file else named_adapter) == 0


def test_a_model_that_is_asked_for_is_taken_in_the_place_of_the_adapters(
    e2e_file, named_adapter, tiny_gpt2, tmp_path, capsys
):
    config = named_adapter / "adapter_config.json"
    told = json.loads(config.read_text())
    moved = str(tmp_path / "moved")
    config.write_text(json.dumps(told | {"base_model_name_or_path": moved}))
    assert decoded(e2e_file, named_adapter) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --model {moved}: ")
    assert f"--adapter {named_adapter} names this model: --model takes another" in err
    assert err.count("\n") == 1
    assert decoded(e2e_file, named_adapter, "--model", tiny_gpt2) == 0


@pytest.mark.parametrize("name", [None, "", 3, "absent"])
def test_without_a_name_in_the_adapter_the_base_is_gpt2_medium(
    e2e_file, named_adapter, name, monkeypatch
):
    config = named_adapter / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    if name == "absent":
        del told["base_model_name_or_path"]
    config.write_text(json.dumps(told))
    asked = []

    def load_tokenizer(model):
        asked.append(model)
        raise InputError("enough")

    monkeypatch.setattr("examples.nlg.model.load_tokenizer", load_tokenizer)
    assert decoded(e2e_file, named_adapter) == 2
    assert asked == ["medium"]


@pytest.mark.parametrize("category", ["", ', "category": " "', ', "category": ["City"]'])
def test_webnlg_is_not_scored_without_a_category(category, tmp_path, capsys):
    """Neither seen nor unseen: the second line is named."""
    path = tmp_path / "predictions.jsonl"
    rows = [
        f'{{"context": "a", "prediction": "a b", "references": ["a b"]{part}}}'
        for part in (', "category": "City"', category)
    ]
    path.write_text("\n".join(rows))
    assert main(["score", "--task", "webnlg", str(path)]) == 2
    assert f"{path}:2: ValueError: category must be a text" in capsys.readouterr().err


def test_what_the_user_has_to_put_right_is_told(e2e_file, tiny_gpt2, tmp_path, capsys):
    common = [
        "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--max-length", "128",
    ]  # fmt: skip
    assert main(["decode", *common, "--adapter", str(tmp_path)]) == 2
    assert "adapter_config.json: no such file" in capsys.readouterr().err
    assert main(["score", "--task", "e2e", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", *common, "--lr", "-1"])


def test_no_adapter_is_written_whose_last_update_diverged(e2e_file, tiny_gpt2, tmp_path, capsys):
    """One step: the loss before it is a number."""
    arguments = [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--max-length",
        "128", "--epochs", "1", "--batch-size", "300", "--lr", "1e30", "--warmup", "0",
        "--output", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "error: after step 1 the loss is nan: --lr 1e+30" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["status"] == "failed"
    assert found["error"].startswith("after step 1 the loss is nan")


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", "1e38"), ("--seed", "4294967296"), ("--seed", "2147483648")]
)
def test_numbers_that_torch_and_numpy_do_not_take_are_refused(option, value, capsys):
    arguments = ["train", "--task", "e2e", "--data", "none.txt", option, value]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"argument {option}: must be in [0, " in capsys.readouterr().err


def test_losses_on_held_out_data_have_lines_of_their_own(e2e_file, tiny_gpt2, tmp_path):
    arguments = [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file),
        "--validation-data", str(e2e_file), "--max-length", "64", "--epochs", "1",
        "--output", str(tmp_path),
    ]  # fmt: skip
    terminal = io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        assert main(arguments) == 0
    assert "\repoch 1 of 1: loss " in terminal.getvalue()  # the bar is wiped away before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], (",\nwith label smoothing and dropout", ",\nwithout label smoothing and dropout")),
        (["--label-smoothing", "0"], (",\nwith dropout", ",\nwithout dropout")),
        (["--label-smoothing", "0", "--dropout", "0"], ("", "")),
    ],
)
def test_the_axes_say_what_one_loss_has_and_the_other_has_not(
    e2e_file, tiny_gpt2, tmp_path, monkeypatch, flags, told
):
    drawn = []
    monkeypatch.setattr(plots, "curves", lambda *arguments: drawn.append(arguments))
    arguments = [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file),
        "--validation-data", str(e2e_file), "--max-length", "64", "--epochs", "1",
        "--output", str(tmp_path), *flags,
    ]  # fmt: skip
    assert main(arguments) == 0
    (_, _, _, unit, _, measure) = drawn[0]
    assert unit == f"nats a predicted token{told[0]}"
    assert measure == f"held-out loss\n(nats a predicted token{told[1]})"


def test_lengths_that_do_not_fit_are_refused(e2e_file, tiny_gpt2, tmp_path, capsys):
    common = [
        "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--output",
        str(tmp_path / "out"), "--max-length",
    ]  # fmt: skip
    for arguments, told in (
        (["decode", *common, "64", "--new-tokens", "64"], "--max-length 64: must be more than "
         "--new-tokens 64"),
        (["train", *common, "12"], f"{e2e_file}: no context is shorter than --max-length 12"),
        (["train", *common, "129"], "--max-length 129: the model has 128 positions"),
        (["decode", *common, "129"], "--max-length 129: the model has 128 positions"),
    ):  # fmt: skip
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told_first(e2e_file, tiny_gpt2, tmp_path, capsys):
    (tmp_path / "file").touch()
    common = [
        "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--max-length", "128",
        "--output",
    ]  # fmt: skip
    for command, output in (
        ("train", tmp_path / "file"),
        ("decode", tmp_path),
        ("decode", tmp_path / "file" / "predictions.jsonl"),
    ):
        assert main([command, *common, str(output)]) == 2
        assert f"--output {output}: " in capsys.readouterr().err


def test_held_out_contexts_that_are_too_long_are_refused(e2e_file, tiny_gpt2, tmp_path, capsys):
    """Rather than not measured."""
    valid = tmp_path / "valid.txt"
    valid.write_text("name : The Mill " * 9 + "||It serves food .")
    arguments = [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file),
        "--validation-data", str(valid), "--max-length", "40", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert f"{valid}: no context is shorter" in capsys.readouterr().err
