"""The whole program, on a tiny random BERT."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

import lora_kernels as lora
from examples.finetune import checkpoint, data, experiment
from examples.finetune import train as training
from examples.finetune.__main__ import main
from examples.finetune.model import load_model, load_tokenizer
from examples.finetune.train import Arm, accuracy, encode, predict

# Per layer, query and value: r·(64 + 64). Head: 64·2 + 2.
TRAINABLE = 2 * 2 * 4 * 128 + 130


@pytest.fixture
def arguments(tiny_model, tiny_data, tmp_path):
    return [
        "--model", tiny_model, "--data", tiny_data, "--output", str(tmp_path / "out"),
        "--epochs", "6", "--rank", "4", "--alpha", "8", "--lr", "1e-2",
    ]  # fmt: skip


def metrics(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_run_learns_saves_and_checks_itself(arguments, tmp_path, tiny_model, device, capsys):
    assert main(arguments) == 0
    printed, bar = capsys.readouterr()
    result = metrics(tmp_path)

    losses = result["losses"]
    assert len(losses) == 6 * -(-150 // 16)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert result["accuracy_before"] < 0.7
    assert result["accuracy_after"] > 0.9
    assert result["trainable_parameters"] == TRAINABLE
    assert (result["training_examples"], result["held_out_examples"]) == (150, 50)
    assert result["device"].startswith(device.type)
    assert result["tokens_per_second"] == result["tokens"] / result["train_seconds"] > 0
    assert result["reload_error"] == 0
    assert result["merge_error"] < 1e-3
    assert result["targets"] == ["query", "value"]

    for label in (
        "accuracy before", "epoch 1 of 6: loss ", ", held-out accuracy ", " left\n",
        "accuracy after", "trainable        2,178 parameters", "tokens/s",
        " kB", "reloaded         ok", "merged           ok", "trained          ok",
    ):  # fmt: skip
        assert label in printed
    assert "60/60" in bar
    assert image.imread(tmp_path / "out" / "curves.png").std() > 0

    adapter = tmp_path / "out" / "adapter"
    assert result["adapter_bytes"] == sum(file.stat().st_size for file in adapter.iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(adapter))


def test_the_adapter_alone_gives_the_accuracy_back(arguments, tmp_path, tiny_model, tiny_data):
    assert main(arguments) == 0
    tokenizer = load_tokenizer(tiny_model)
    _, held = data.split(data.load(tiny_data), tiny_data)
    features = encode(tokenizer, held, [0, 1], 64)
    model = load_model(tiny_model, 2, tokenizer, seed=99)
    lora.load_adapter(model, tmp_path / "out" / "adapter")
    logits = predict(model.eval(), tokenizer, features)
    assert accuracy(logits, features) == metrics(tmp_path)["accuracy_after"]


def test_two_runs_with_one_seed_agree_and_another_seed_differs(arguments, tmp_path):
    def run(seed):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main([*arguments, "--epochs", "1", "--dropout", "0.2", "--seed", seed]) == 0
        result = metrics(tmp_path)
        return result["losses"], result["accuracy_before"], result["accuracy_after"]

    first = run("3")
    assert run("3") == first
    assert run("4")[0] != first[0]


def test_compare_peft_starts_equal_stays_equal_and_prints_both(arguments, tmp_path, capsys):
    # Without dropout in LoRA the two arms differ by rounding only.
    assert main([*arguments, "--epochs", "1", "--dropout", "0", "--compare-peft"]) == 0
    result = metrics(tmp_path)
    ours, peft = result["losses"], result["peft"]["losses"]
    assert ours[0] == pytest.approx(peft[0], rel=1e-5)
    assert ours == pytest.approx(peft, rel=1e-2)
    assert len(set(ours)) > 1
    for same in ("tokens", "trainable_parameters", "accuracy_before"):
        assert result["peft"][same] == result[same]
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[1].startswith("lora_kernels ")
    assert table[2].startswith("PEFT ")
    assert "of the time of PEFT" in table[3]


def test_any_number_of_classes_and_any_labels(arguments, tmp_path):
    path = tmp_path / "three.tsv"
    rows = [f"the soup was {w} {'s' * i}\t{y}" for i in range(8) for y, w in
            ((-1, "bad"), (5, "good"), (9, "cold"))]  # fmt: skip
    path.write_text("\n".join(["sentence\tlabel", *rows]), encoding="utf-8")
    assert main([*arguments, "--data", str(path), "--epochs", "1"]) == 0
    assert metrics(tmp_path)["classes"] == [-1, 5, 9]


def test_an_overlong_sentence_is_cut_to_what_the_model_takes(arguments, tmp_path):
    path = tmp_path / "long.tsv"
    rows = [
        f"{'very ' * (60 + i)}{w}\t{y}" for i in range(4) for y, w in enumerate(("bad", "good"))
    ]
    path.write_text("\n".join(["sentence\tlabel", *rows]), encoding="utf-8")
    assert main([*arguments, "--data", str(path), "--epochs", "1", "--max-length", "500"]) == 0
    assert metrics(tmp_path)["tokens"] == 6 * 32


@pytest.mark.parametrize(
    ("kind", "targets", "sizes"),
    [
        ("roberta", "query,value", {"num_hidden_layers": 1, "max_position_embeddings": 40}),
        ("distilbert", "q_lin,v_lin", {"dim": 32, "n_layers": 1, "hidden_dim": 32, "n_heads": 2}),
        ("gpt2", "c_attn", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}),
        ("llama", "q_proj,v_proj", {"num_hidden_layers": 1}),
    ],
)
def test_other_architectures_run_by_naming_their_layers(
    arguments, tmp_path, tiny_model, kind, targets, sizes
):
    path = str(tmp_path / kind)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if kind in ("gpt2", "llama"):  # decoders come without a padding token
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(path)
    if kind in ("roberta", "llama"):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, **sizes}
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=2, eos_token_id=3, **sizes
    )
    config.pad_token_id = tokenizer.pad_token_id
    AutoModel.from_config(config).save_pretrained(path)
    assert main([*arguments, "--model", path, "--targets", targets, "--epochs", "1"]) == 0
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in saved if "lora_A" in key} == set(targets.split(","))
    assert any("lora_" not in key for key in saved)


# ---- again and on ----


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_told_again_and_never_overwritten(arguments, tmp_path, capsys):
    arguments += ["--epochs", "1"]
    assert main(arguments) == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "holds this run: --resume tells its results, another folder starts anew" in error
    assert main([*arguments, "--resume", "--rank", "2"]) == 2
    assert "holds another run: rank was 4, is 2" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "the run has ended" in capsys.readouterr().out
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("compare", [[], ["--compare-peft"]], ids=["alone", "with PEFT"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(arguments, tmp_path, monkeypatch, compare):
    # Of 38 batches an epoch; how often a run saves does not change what it trains.
    arguments = [*arguments, "--epochs", "2", "--batch-size", "4", *compare]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    train_on = Arm.train_on

    def stopped(arm, *args):
        if len(arm.losses) == 42:
            raise KeyboardInterrupt
        train_on(arm, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Arm, "train_on", stopped)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, "--save-every", "7"])
    left = metrics(tmp_path)
    assert (left["status"], left["step"], len(left["losses"])) == ("interrupted", 42, 42)
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 42
    assert main([*arguments, "--resume"]) == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    found = metrics(tmp_path)
    assert found["status"] == whole["status"] == "complete"
    for same in ("losses", "accuracies", "accuracy_after", "tokens"):
        assert found[same] == whole[same], same
    if compare:
        assert found["peft"]["losses"] == whole["peft"]["losses"]
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "out")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("every", "expected"), [(3, range(3, 39, 3)), (25, [25]), (38, [38])])
def test_checkpoints_come_at_multiples_of_save_every(arguments, monkeypatch, every, expected):
    steps = []
    monkeypatch.setattr(checkpoint, "save", lambda path, arms, step, measured: steps.append(step))
    arguments = [*arguments, "--epochs", "1", "--batch-size", "4"]  # 38 steps
    assert main([*arguments, "--save-every", str(every)]) == 0
    assert steps == list(expected)


def test_the_bar_moves_with_every_batch_and_shows_the_loss(arguments, monkeypatch):
    moved, shown = [], []

    class Bar(tqdm):
        def update(self, n=1):
            moved.append(n)
            super().update(n)
            return True  # as after a tenth of a second

        def set_postfix(self, **values):
            shown.append(len(moved))

    monkeypatch.setattr(training, "tqdm", Bar)
    assert main([*arguments, "--epochs", "1"]) == 0
    assert moved == [1] * 10
    assert set(shown) == set(range(1, 11))


def test_a_damaged_checkpoint_is_named(arguments, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert main([*arguments, "--resume"]) == 2
    assert f"{tmp_path / 'out' / 'checkpoint.pt'}: cannot be read" in capsys.readouterr().err


# ---- what is refused ----


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "none.tsv"], "none.tsv: cannot be read"),
        (["--held-out", "200"], "got 200 of 200"),
        (["--train", "1000"], "--train 1000"),
    ],
)
def test_bad_data_ends_in_one_line_before_the_model_is_loaded(arguments, extra, message, capsys):
    # The model given here does not exist; a run that came so far would complain of it.
    assert main([*arguments, "--model", "./nowhere", *extra]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "./nowhere"], "--model ./nowhere"),
        (["--targets", "nothing,like_it"], "--targets nothing like_it"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_bad_options_end_in_one_line(arguments, extra, message, capsys):
    assert main([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_compare_peft_without_peft_ends_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*arguments, "--compare-peft"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --compare-peft: ")


def test_an_output_that_is_a_file_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(arguments) == 2
    assert f"--output {tmp_path / 'out'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [
        ["--rank", "0"], ["--epochs", "x"], ["--dropout", "1"], ["--dropout", "nan"],
        ["--lr", "-1"], ["--alpha", "inf"], ["--batch-size", "0"], ["--targets", "query,,value"],
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(arguments, extra, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, *extra])
    assert exit_.value.code == 2
    assert f"argument {extra[0]}" in capsys.readouterr().err


def test_the_command_line_answers_bad_data_without_loading_transformers(tmp_path):
    program = (
        "import sys; from examples.finetune.__main__ import main; "
        "code = main(['--data', 'none.tsv']); "
        "sys.exit(9 if 'transformers' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


# ---- what is not trusted ----


def test_a_diverged_run_ends_at_once_and_writes_no_adapter(arguments, tmp_path, capsys):
    assert main([*arguments, "--lr", "1e30", "--epochs", "2"]) == 2
    found = metrics(tmp_path)
    # Without a rate at the first step, and with too high a one at the second.
    assert found["error"] == "at step 3 the loss of lora_kernels is nan: --lr 1e+30 too high?"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {found['error']}"
    assert (found["status"], found["losses"][2:]) == ("failed", [None] * 8)
    assert not (tmp_path / "out" / "adapter").exists()


def test_weights_that_the_last_step_spoils_fail_the_run(arguments, tmp_path, monkeypatch, capsys):
    train_on = Arm.train_on

    def spoiled(arm, *args):
        train_on(arm, *args)
        arm.parameters[0].data.fill_(float("inf"))

    monkeypatch.setattr(Arm, "train_on", spoiled)
    assert main([*arguments, "--epochs", "1"]) == 1
    assert "trained          FAILED: losses and trained weights must be finite" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_adapter_that_comes_back_changed_fails_the_run(arguments, monkeypatch, capsys):
    load = lora.load_adapter

    def load_without_head(model, directory):
        head = {k: v.clone() for k, v in model.classifier.state_dict().items()}
        load(model, directory).classifier.load_state_dict(head)
        return model

    monkeypatch.setattr(lora, "load_adapter", load_without_head)
    assert main([*arguments, "--epochs", "1"]) == 1
    assert "reloaded         FAILED" in capsys.readouterr().out


def test_a_wrong_merge_fails_the_run(arguments, monkeypatch, capsys):
    delta = lora.LoRALinear.delta_weight
    monkeypatch.setattr(lora.LoRALinear, "delta_weight", lambda layer: 1.1 * delta(layer))
    assert main([*arguments, "--epochs", "1"]) == 1
    assert "merged           FAILED" in capsys.readouterr().out
