"""What a checkpoint holds, and that ``--resume`` refuses, by name, what would change the result.

Another number of processes: test_processes.py. The same bits as without a break: test_train.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples import runs
from examples.errors import InputError
from examples.nlg.__main__ import main
from examples.nlg.checkpoints import check_fresh
from examples.nlg.model import load_model


@pytest.fixture(scope="module")
def command(e2e_file, tiny_gpt2) -> list[str]:
    """A short training, but for --output."""
    return [
        "train", "--model", tiny_gpt2, "--task", "e2e", "--data", str(e2e_file), "--max-length",
        "64", "--epochs", "1", "--batch-size", "16", "--warmup", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    """The output of a whole training."""
    output = tmp_path_factory.mktemp("finished")
    assert main([*command, "--output", str(output)]) == 0
    return output


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_checkpoints_hold_the_adapter_and_no_base_weight(finished, tiny_gpt2):
    (checkpoint,) = finished.glob("checkpoints/*")
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    assert len(tensors) == 4
    assert all("c_attn.lora_" in key for key in tensors)
    base = Path(tiny_gpt2, "model.safetensors").stat().st_size
    assert max(path.stat().st_size for path in checkpoint.iterdir()) < base / 2

    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == tensors.keys()
    assert all(torch.equal(adapter[name], tensors[name]) for name in tensors)


def test_an_earlier_runs_checkpoints_are_not_overwritten_unasked(tmp_path):
    check_fresh(tmp_path, resume=False)
    (tmp_path / "checkpoints" / "step-00000100").mkdir(parents=True)
    check_fresh(tmp_path, resume=True)
    with pytest.raises(InputError, match="holds a run: --resume goes on with it"):
        check_fresh(tmp_path, resume=False)


def test_results_say_on_what_and_with_which_data(command, finished, e2e_file, tmp_path, device):
    found = runs.read_json(finished / "results.json")
    assert (found["data"], found["validation_data"]) == (str(e2e_file), None)
    assert found["device"] == device.type
    other = tmp_path / "other.txt"
    other.write_text(e2e_file.read_text(encoding="utf-8"), encoding="utf-8")
    hashes = [found["data_hash"]]
    for end in ("", "name : Cotto||Cotto ."):  # the same examples, then one more
        other.write_text(other.read_text(encoding="utf-8") + end, encoding="utf-8")
        output = tmp_path / f"run{len(hashes)}"
        assert main([*command, "--data", str(other), "--output", str(output)]) == 0
        hashes.append(runs.read_json(output / "results.json")["data_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


# Option, value, what is told.
CHANGED = [
    ("--rank", "2", "rank was 4, is 2"),
    ("--alpha", "16", "alpha was 32.0, is 16.0"),
    ("--dropout", "0", "dropout was 0.1, is 0.0"),
    ("--max-length", "63", "max_length was 64, is 63"),
    ("--precision", "bf16", "precision was fp32, is bf16"),
    ("--batch-size", "8", "batch_size was 16, is 8"),
    ("--epochs", "2", "epochs was 1, is 2"),
]


@pytest.mark.parametrize("changed", [CHANGED, CHANGED[:1]], ids=["all", "the rank"])
def test_other_options_are_refused(command, finished, changed, capsys, fresh_accelerate):
    before = files(finished)
    options = [text for option, value, _ in changed for text in (option, value)]
    assert main([*command, "--output", str(finished), "--resume", *options]) == 2
    error = capsys.readouterr().err
    assert all(told in error for _, _, told in changed)
    assert error.count(" was ") == len(changed)
    assert files(finished) == before


def test_another_model_is_refused(command, finished, tiny_gpt2, tmp_path, capsys):
    other = shutil.copytree(tiny_gpt2, tmp_path / "other")
    assert main([*command, "--output", str(finished), "--resume", "--model", str(other)]) == 2
    assert f"model was {tiny_gpt2}, is {other}" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_refused(
    command, finished, tiny_gpt2, tmp_path, capsys
):
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    arguments = [*command, "--model", str(base), "--output", str(tmp_path / "output")]
    assert main(arguments) == 0
    model = load_model(str(base))
    model.transformer.h[1].mlp.c_fc.weight.data *= 1.01
    model.save_pretrained(base)
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "frozen weights was " in error
    assert error.count(" was ") == 1


def test_other_examples_are_refused_and_the_same_ones_in_another_file_are_not(
    command, finished, e2e_file, tmp_path, capsys
):
    lines = e2e_file.read_text(encoding="utf-8").splitlines(keepends=True)
    path, again = tmp_path / "other.txt", [*command, "--output", str(finished), "--resume"]
    path.write_text("".join(lines[::-1]), encoding="utf-8")
    assert main([*again, "--data", str(path)]) == 2
    assert "examples was 48 with hash" in capsys.readouterr().err
    path.write_text("".join(lines), encoding="utf-8")
    assert main([*again, "--data", str(path)]) == 0


def test_a_checkpoint_without_a_record_is_refused(command, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "copy")
    (record,) = output.glob("checkpoints/*/run.json")
    record.unlink()
    assert main([*command, "--output", str(output), "--resume"]) == 2
    assert f"{record}: cannot be read" in capsys.readouterr().err


def test_a_finished_run_is_told_again_and_stays_as_it_is(
    command, e2e_file, tmp_path, monkeypatch, capsys
):
    command = [*command, "--validation-data", str(e2e_file), "--output", str(tmp_path)]
    assert main(command) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "epoch 1 of 1: " in line]
    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(runs, "versions", lambda: {})
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("holds a run: --resume tells its results, another folder starts anew")
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["resume: the run has ended", *told]
    assert "loss on " in told[0]
    assert (tmp_path / "results.json").read_bytes() == before


def test_without_a_checkpoint_resuming_starts(command, finished, tmp_path):
    """As after a kill that came before the first checkpoint."""
    assert main([*command, "--output", str(tmp_path), "--resume"]) == 0
    one, other = (json.loads((path / "results.json").read_text()) for path in (finished, tmp_path))
    assert one["losses"] == other["losses"]
