"""Training through the Trainer: checkpoints, resuming, the best epoch, the whole program."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainingArguments

import lora_kernels as lora
from examples.finetune.model import load_tokenizer
from examples.nlu import compare
from examples.nlu.__main__ import main
from examples.nlu.data import load
from examples.nlu.model import adapt, load_model
from examples.nlu.tasks import TASKS, settings
from examples.nlu.train import AdapterTrainer, encode, make_trainer
from tests.examples.nlu.conftest import REPOSITORY

# BERT's pooler and the classifier.
HEAD = (64 * 64 + 64) + (64 * 2 + 2)
# Two layers, query and value, r = 4, width 64.
TRAINABLE = 2 * 2 * 4 * 128 + HEAD


PEFT = "base_model.model."


def losses(result) -> list[float]:
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


def test_a_run_learns_and_leaves_results_curves_and_the_adapter(
    nlu, tiny_model, tmp_path, device, capsys
):
    result = nlu(epochs="4")
    assert result["dev"]["held_out"]["accuracy"] > 0.9
    assert result["dev"]["held_out"]["examples"] == 50
    assert result["trainable_parameters"] == TRAINABLE
    assert result["settings"]["lr"] == 0.01
    assert result["settings"]["batch_size"] == 16
    assert result["device"] == device.type
    weights = Path(tiny_model, "model.safetensors").read_bytes()
    assert result["model_hash"] == hashlib.sha256(weights).hexdigest()[:12]
    assert result["peak_memory_bytes"] > 0
    assert result["train_seconds"] > 0
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert [entry["epoch"] for entry in result["log"] if "eval_accuracy" in entry] == [1, 2, 3, 4]
    assert image.imread(tmp_path / "run" / "curves.png").std() > 0
    saved = tmp_path / "run" / "trained"
    assert result["saved_bytes"] == (saved / "adapter_model.safetensors").stat().st_size
    printed, bar = capsys.readouterr()
    assert f"{TRAINABLE:,} train" in printed
    assert printed.count(", accuracy ") >= 4
    for epoch in range(1, 5):
        mean = fmean(losses(result)[10 * (epoch - 1) : 10 * epoch])  # every step is logged
        assert f"epoch {epoch} of 4: loss {mean:.3f}, accuracy " in printed
    assert " left\nepoch" not in bar
    assert "loss=" in bar
    assert "\x1b[A" not in bar


def test_checkpoints_behind_an_evaluation_hold_the_adapter_and_no_base_weight(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    task, chosen = TASKS["sst2"], replace(settings("roberta-base", "sst2"), epochs=2, lr=1e-2)
    tokenizer = load_tokenizer(tiny_model)
    data = load(task, tiny_data, held_out=50)
    model = adapt(load_model(tiny_model, task, chosen, tokenizer, 0), "lora", chosen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, lora.LoRALayer)}
    merged = []
    save_model = AdapterTrainer.save_model

    def watched(self, *args, **kwargs):
        merged.append({layer.merged for layer in layers.values()})
        save_model(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "save_model", watched)
    trainer = make_trainer(
        model, tokenizer, task, chosen, encode(tokenizer, data.train, 32),
        encode(tokenizer, data.dev["held_out"], 32), method="lora", output=tmp_path, seed=0,
    )  # fmt: skip
    trainer.train()

    assert merged == [{True}, {True}]
    folders = list(tmp_path.glob("checkpoint-*"))
    assert folders
    factors = {f"{PEFT}{path}.lora_{x}.weight" for path in layers for x in "AB"}
    for folder in folders:
        stored = load_file(folder / "adapter_model.safetensors")
        head = {
            key for key in stored if key.startswith((f"{PEFT}bert.pooler", f"{PEFT}classifier"))
        }
        assert set(stored) == factors | head
        assert sum(stored[key].numel() for key in head) == HEAD
        assert not {"model.safetensors", "pytorch_model.bin"} & set(os.listdir(folder))
    # The model's own state dict holds the base bit for bit, though its layers are merged.
    model.eval()
    assert {layer.merged for layer in layers.values()} == {True}
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    changed = {key for key, value in state.items() if not torch.equal(value, before[key])}
    assert changed == {key for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("sampling", "where", "step", "newest"),
    [
        ((), "training_step", 25, 20),  # of 30; the checkpoints are behind 10 and 20
        (("--group-by-length",), "_save_rng_state", 20, 10),  # in the middle of a checkpoint
    ],
    ids=["random", "by length"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    nlu, tmp_path, monkeypatch, sampling, where, step, newest
):
    flags = ("--keep", "last", "--dropout", "0.1", *sampling)
    whole = nlu(*flags, name="whole")
    method = getattr(AdapterTrainer, where)

    def killed(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, where, killed)
        with pytest.raises(KeyboardInterrupt) as stopped:  # keeps all that is alive in it
            nlu(*flags, name="killed")
    # An open one is drawn again when Python ends, behind the line that says what to do.
    assert stopped.value.__traceback__
    assert not tqdm._instances
    left = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert left["status"] == "interrupted"
    assert left["log"]
    assert left["versions"]["lora_kernels"] == lora.__version__
    assert (tmp_path / "killed" / "checkpoint-20").is_dir()
    # As if it had taken a thousand seconds up to its newest complete checkpoint.
    file = tmp_path / "killed" / f"checkpoint-{newest}" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["Clock"]["attributes"]["train_seconds"] += 1000
    file.write_text(json.dumps(state))
    resumed = nlu(*flags, "--resume", name="killed")

    assert resumed["dev"] == whole["dev"]
    assert losses(resumed) == losses(whole)
    assert 1000 < resumed["train_seconds"] < 1100
    assert resumed["train_cpu_seconds"] > 0
    first, second = (
        load_file(tmp_path / name / "trained" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_old_run_is_neither_overwritten_nor_resumed_as_another(nlu, tmp_path, capsys):
    first = nlu(epochs="1")
    for extra, changes, message in (
        ((), {}, "holds this run: --resume tells its results"),
        (("--resume",), {"alpha": "16"}, "alpha was 8, is 16.0: another folder"),
        ((), {"settings": "roberta-base-scripts"}, "settings was roberta-base, is roberta-base-s"),
    ):
        with pytest.raises(AssertionError):
            nlu(*extra, epochs="1", **changes)
        assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == first
    capsys.readouterr()
    assert nlu("--resume", epochs="1") == first
    printed = capsys.readouterr().out
    assert "resume     the run has ended\nheld_out   accuracy" in printed
    assert f"results    {tmp_path / 'run' / 'results.json'}" in printed


@pytest.mark.parametrize("keep", ["best", "none"])
def test_a_run_that_has_ended_is_told_again_without_its_checkpoints(nlu, tmp_path, capsys, keep):
    first = nlu(keep=keep, epochs="1")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    assert nlu("--resume", keep=keep, epochs="1") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before
    for extra, epochs, message in (
        ((), "1", "this"),
        ((), "2", "another"),
        (("--resume",), "2", "another"),
    ):
        with pytest.raises(AssertionError):
            nlu(*extra, keep=keep, epochs=epochs)
        assert f"holds {message} run: " in capsys.readouterr().err


def test_folders_know_the_settings(tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("roberta-large", "roberta-large-restricted"):
        arguments = ["--task", "sst2", "--model", tiny_model, "--data", tiny_data]
        arguments += ["--settings", name, "--seed", "3", "--epochs", "0.1", "--keep", "none"]
        assert main(arguments) == 0
    model = Path(tiny_model).name
    assert {str(file) for file in Path("runs").rglob("results.json")} == {
        f"runs/nlu/{model}/{name}/sst2/lora-3/results.json"
        for name in ("roberta-large", "roberta-large-restricted")
    }


def test_a_run_measured_again_is_no_further_seed(nlu, tmp_path):
    trained = nlu("--keep", "none", epochs="1")
    nlu("--evaluate-only", adapter=tmp_path / "run" / "trained")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == trained
    assert [file.name for file in tmp_path.rglob("results.json")] == ["results.json"]


def test_the_best_epoch_counts_and_not_the_last_also_in_a_run_that_was_moved(
    nlu, tmp_path, monkeypatch
):
    # From the second epoch on, the labels are turned round.
    step = AdapterTrainer.training_step

    def spoiled(self, model, inputs, *args, **kwargs):
        if self.state.epoch >= 2:
            inputs["labels"] = 1 - inputs["labels"]
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", spoiled)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "_load_best_model", killed)
        with pytest.raises(KeyboardInterrupt):
            nlu(epochs="4", warmup="0", name="killed")
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2
    # Its states hold the path that its folder had.
    (tmp_path / "killed").rename(tmp_path / "run")
    result = nlu("--resume", epochs="4", warmup="0")
    seen = [entry["eval_accuracy"] for entry in result["log"] if "eval_accuracy" in entry]
    assert seen[-1] < max(seen)
    # In the end the Trainer deletes the last checkpoint.
    (best,) = (tmp_path / "run").glob("checkpoint-*")
    assert best.name == f"checkpoint-{10 * (1 + seen.index(max(seen)))}"
    assert result["dev"]["held_out"]["accuracy"] == max(seen)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_what_is_saved_alone_gives_the_scores_back(nlu, tmp_path, method):
    trained = nlu("--keep", "last", method=method, epochs="2")
    again = nlu("--evaluate-only", name="again", method=method, seed="7",
                adapter=tmp_path / "run" / "trained")  # fmt: skip
    assert again["dev"] == trained["dev"]
    assert again["train_seconds"] == again["saved_bytes"] == 0


def test_a_resumed_head_is_that_of_its_checkpoint(nlu, tmp_path):
    trained = nlu(method="head", epochs="3")
    best = {entry["eval_accuracy"] for entry in trained["log"] if "eval_accuracy" in entry}
    assert trained["dev"]["held_out"]["accuracy"] == max(best) > 0.5
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed before
    again = nlu("--resume", method="head", epochs="3")
    assert again["dev"] == trained["dev"]
    # Checkpoints are as small as what is saved in the end.
    heads = list((tmp_path / "run").glob("*/*.safetensors"))
    assert {file.name for file in heads} == {"head.safetensors"}
    assert {file.stat().st_size for file in heads} == {trained["saved_bytes"]}


def test_a_head_is_no_adapter_and_an_adapter_no_head(nlu, tmp_path, capsys):
    for method in ("lora", "head"):
        nlu("--keep", "none", method=method, epochs="0.1", name=method)
    for method, other, fault in (("lora", "head", "missing"), ("head", "lora", "unexpected")):
        with pytest.raises(AssertionError):
            nlu(method=method, adapter=tmp_path / other / "trained")
        assert f"{fault} bert.encoder.layer.0." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nlu(method="full", adapter=tmp_path / "head" / "trained")


def test_a_file_needs_the_alpha_that_the_user_chose(nlu, tiny_model, tiny_data, tmp_path, capsys):
    chosen = settings("roberta-base", "sst2")
    tokenizer = load_tokenizer(tiny_model)
    model = adapt(load_model(tiny_model, TASKS["sst2"], chosen, tokenizer, 0), "lora", chosen)
    file = tmp_path / "some.bin"
    torch.save(dict(lora.lora_state_dict(model)), file)
    arguments = {"adapter": file, "rank": "8"}
    with pytest.raises(AssertionError):
        nlu("--evaluate-only", settings=None, **arguments)
    assert f"error: {file}: does not say its alpha" in capsys.readouterr().err
    nlu("--evaluate-only", settings=None, alpha="8", **arguments)
    nlu("--evaluate-only", settings="roberta-base-scripts", **arguments)


def test_rte_starts_from_the_adapter_of_mnli(nlu, pairs, tmp_path, capsys):
    mnli = nlu("--keep", "none", task="mnli", data=pairs, name="mnli", epochs="1")
    assert set(mnli["dev"]) == {"matched", "mismatched"}
    correct = [one["accuracy"] * one["examples"] for one in mnli["dev"].values()]
    assert mnli["paper_score"] == pytest.approx(sum(correct) / 24)

    rte = tmp_path / "rte"
    rte.mkdir()
    for name in ("train", "dev"):
        rows = ["sentence1\tsentence2\tlabel", "the soup was bad\tthe soup was cold\t0"]
        (rte / f"{name}.tsv").write_text("\n".join([*rows, "the train was good\t.\t1"]))
    start = tmp_path / "mnli" / "trained"
    nlu("--keep", "none", task="rte", data=rte, name="out", epochs="1", start_from=start)
    printed = capsys.readouterr().out
    names = [f"{path}.{leaf}" for path in ("bert.pooler.dense", "classifier")
             for leaf in ("bias", "weight")]  # fmt: skip
    assert f"without its head: left out {', '.join(names)}" in printed
    nlu("--keep", "none", task="rte", data=rte, name="plain", epochs="1")
    assert "(--start-from)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_a_head_that_nobody_trained_is_not_measured(nlu, tiny_model, tmp_path, capsys, method):
    with pytest.raises(AssertionError):
        nlu("--evaluate-only", method=method)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --model {tiny_model}: 2 weights of a BertForSequence")
    assert error.endswith("the first is classifier.bias")


def test_a_whole_model_is_measured_on_its_task_alone(nlu, pairs, tiny_model, tmp_path, capsys):
    trained = nlu("--keep", "none", method="full", epochs="1")
    model = tmp_path / "run" / "trained"
    assert nlu("--evaluate-only", model=model, name="again")["dev"] == trained["dev"]
    with pytest.raises(AssertionError):
        nlu("--evaluate-only", model=model, task="mnli", data=pairs)
    assert "or have another shape, the first is classifier.bias" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nlu("--evaluate-only", start_from=model)
    assert "--start-from draws a new head" in capsys.readouterr().err


def test_stsb_is_a_regression(nlu, tmp_path):
    words = ["bad", "dreary", "cold", "kind", "warm", "good"]
    rows = [f"the {s} was {w}\tthe {s}\t{y}.0" for s in ("soup", "train", "coat", "film")
            for y, w in enumerate(words)]  # fmt: skip
    for name in ("train", "dev"):
        text = "\n".join(["sentence1\tsentence2\tscore", *rows])
        (tmp_path / f"{name}.tsv").write_text(text)
    result = nlu("--keep", "none", task="stsb", data=tmp_path, epochs="15", batch_size="8")
    assert result["dev"]["dev"]["pearson"] > 0.8
    assert result["dev"]["dev"]["combined"] > 0.8


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "nowhere.tsv"], "nowhere.tsv"),
        (["--settings", "bert"], "--settings must be one of"),
        (["--model", "/nowhere"], "--model /nowhere"),
        (["--adapter", "nowhere"], "nowhere: cannot be read"),
        (["--targets", "nowhere"], "--targets nowhere"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    extra, message, tiny_model, tiny_data, tmp_path, capsys
):
    arguments = ["--task", "sst2", "--model", tiny_model, "--data", tiny_data]
    assert main([*arguments, "--output", str(tmp_path), *extra]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_seed_is_one_that_numpy_takes(nlu, capsys):
    with pytest.raises(SystemExit):
        nlu(seed=2**31)
    assert f"argument --seed: must be in [0, {2**31}), got {2**31}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_diverges_ends_with_2_and_saves_nothing(nlu, tmp_path, capsys, method):
    with pytest.raises(AssertionError):
        nlu(method=method, lr="1e30", epochs="1")
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    # The first step has no rate yet, the second makes the weights too large.
    assert last == "error: --lr 1e+30: the run has diverged: the loss is nan at step 3"
    assert "loss=0.000" not in err
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "results.json",
        "run.json",
    }
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["status"] == "failed"
    assert "has diverged" in found["error"]
    assert losses(found)[2:] == [None]
    nlu(method=method, epochs="1")  # what has left nothing is in nobody's way


def test_mixed_precision_on_a_cpu(nlu, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    seen = set()
    forward = lora.LoRALinear.forward

    def watched(self, x):
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(lora.LoRALinear, "forward", watched)
    result = nlu("--keep", "none", precision="bf16", epochs="4")
    assert seen == {torch.bfloat16}
    assert result["dev"]["held_out"]["accuracy"] > 0.9
    assert result["precision"] == "bf16"
    with pytest.raises(AssertionError):
        nlu(precision="fp16", name="fp16")
    assert "error: --precision fp16: needs a GPU" in capsys.readouterr().err


def test_processes_that_do_not_train_together_are_refused(nlu, monkeypatch, capsys):
    # Where the Trainer is not told that it runs on the CPU, it takes no notice of torchrun.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError):
        nlu()
    assert "error: WORLD_SIZE is 2, and the Trainer has 1" in capsys.readouterr().err


def test_one_process_on_several_gpus_is_refused(nlu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(AssertionError):
        nlu()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: this process sees 2 GPUs: torchrun or accelerate launch")
    assert error.endswith("CUDA_VISIBLE_DEVICES=0 lets it see one")
    assert not list((tmp_path / "run").iterdir())


def test_texts_are_cut_to_the_positions_of_the_model(nlu, tiny_model, tmp_path):
    model, data = tmp_path / "model", tmp_path / "long.tsv"
    shutil.copytree(tiny_model, model)
    config = model / "tokenizer_config.json"
    told = json.loads(config.read_text())
    assert told.pop("model_max_length") == 32
    config.write_text(json.dumps(told))
    rows = [f"{word} {'and ' * i} {word}\t{i % 2}" for i in range(40) for word in ("good", "bad")]
    data.write_text("\n".join(["sentence\tlabel", *rows]))
    result = nlu("--keep", "none", model=model, data=data, max_length="40", epochs="0.1")
    assert result["dev"]["held_out"]["examples"] == 20


# ---- comparing ----


def test_the_comparison_sums_up_and_draws_runs_of_all_methods(nlu, tmp_path):
    runs = [
        nlu("--keep", "none", *compare.FLAGS[method], name=method, epochs="1", validation="20")
        | {"compared_as": method}
        for method in compare.METHODS
    ]
    all_run, lora_run, full_run, _ = runs
    rows = compare.summarise([*runs, {**lora_run, "dev": full_run["dev"]}])
    at_rank_4 = TRAINABLE - HEAD
    query_value = HEAD + 2 * at_rank_4
    # All linear layers: the two others of attention, and those of 64 x 128.
    everywhere = HEAD + 8 * (at_rank_4 + 2 * (2 * 4 * 128 + 2 * 4 * 192))
    assert [row["trainable_parameters"] for row in rows.values()] == [
        everywhere, query_value, full_run["total_parameters"], HEAD
    ]  # fmt: skip
    first, second, third = (run["dev"]["held_out"]["accuracy"] for run in runs[1:])
    assert rows["query-value"]["accuracies"] == [first, second]
    assert rows["query-value"]["accuracy"] == pytest.approx((first + second) / 2, rel=1e-15)
    assert rows["head"]["accuracies"] == [third]
    saved = [run["saved_bytes"] - 4 * run["trainable_parameters"] for run in runs]
    assert all(0 < names < 10_000 for names in saved)  # float32, and the names of the tensors
    table = compare.table(rows).splitlines()
    assert len(table) == 6
    assert f"| LoRA, r = 8, query and value | {50 * (first + second):.2f} |" in table[3]
    assert f"| {query_value:,} |" in table[3]
    assert compare.tuning_table(runs).count("0.01: ") == 4
    best = {**all_run, "dev": {"validation": {"accuracy": 1.1}}, "settings": {"lr": 3.0}}
    assert compare._best_rate([*runs, best], "lora") == 3.0
    compare.plot(runs, tmp_path / "compare.png")
    assert image.imread(tmp_path / "compare.png").std() > 0


def test_the_comparison_starts_runs_as_processes_and_reads_them_back(
    tiny_model, sst2, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    options = compare._parser().parse_args(
        ["--data", sst2, "--model", tiny_model, "--output", str(tmp_path), "--train", "64",
         "--validation", "20", "--held-out", "40"]
    )  # fmt: skip
    result = compare._run(options, "lora", 1, 1e-3, "one")
    assert {name: one["examples"] for name, one in result["dev"].items()} == {
        "validation": 20, "held_out": 40
    }  # fmt: skip
    assert (result["settings"]["lr"], result["seed"]) == (1e-3, 1)
    assert result["training_examples"] == 64
    # A fresh process: its peak is its own, and training adds to it.
    assert result["peak_memory_bytes"] >= result["memory_before_training_bytes"] > 0
    # A second call keeps the runs that have ended.
    monkeypatch.setattr(compare.subprocess, "run", lambda command, check: main(command[3:]))
    assert compare._run(options, "lora", 1, 1e-3, "one") == result


@pytest.mark.parametrize("flag", ["--seeds", "--train", "--epochs"])
def test_the_comparison_needs_one_of_each_at_least(flag, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--data", "some.tsv", flag, "0"])
    assert f"argument {flag}: must be in [1, inf), got 0" in capsys.readouterr().err
