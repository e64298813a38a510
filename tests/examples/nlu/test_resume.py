"""What a run is, and which checkpoint it goes on from."""

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from examples import runs
from examples.errors import InputError
from examples.nlu import resume
from examples.nlu.__main__ import _parser
from examples.nlu.data import Data, Example
from examples.nlu.experiment import choose_settings
from examples.nlu.tasks import TASKS

DATA = Data([Example("a", None, 0), Example("b", None, 1)], {"dev": [Example("c", None, 1)]})


def record(*flags, data=DATA, model_hash="a", device="cpu") -> dict:
    options = _parser().parse_args(["--task", "sst2", *flags])
    task = TASKS[options.task]
    return resume.record(options, task, choose_settings(options, task), data, model_hash, device)


THIS = record()


@pytest.fixture
def output(tmp_path):
    """A folder with two checkpoints of THIS, of the files that the Trainer writes."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(100)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"a": torch.zeros(100)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / runs.RECORD).write_text(json.dumps(THIS))
    return tmp_path


def test_no_checkpoint_is_none_to_go_on_from(tmp_path):
    assert resume.checkpoint(tmp_path, THIS, resume=True) is None
    assert resume.checkpoint(tmp_path, THIS, resume=False) is None


def test_the_newest_by_its_step_is_taken_if_asked_for(output):
    assert resume.checkpoint(output, THIS, resume=True) == str(output / "checkpoint-10")
    with pytest.raises(InputError, match="holds this run: --resume goes on with it"):
        resume.checkpoint(output, THIS, resume=False)


FILES = [
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "share"), [*itertools.product(FILES, (0, 0.6)), *((name, None) for name in FILES)]
)
def test_one_that_was_not_written_to_its_end_is_passed_over(output, name, share):
    file = output / "checkpoint-10" / name
    if share is None:
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
    assert resume.checkpoint(output, THIS, resume=True) == str(output / "checkpoint-9")


def test_none_complete_is_a_new_start(output):
    for folder in output.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert resume.checkpoint(output, THIS, resume=True) is None


def test_every_process_has_to_have_written_its_random_state(output):
    this = {**THIS, "processes": 2}
    (output / runs.RECORD).write_text(json.dumps(this))
    for folder in output.glob("checkpoint-*"):
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert resume.checkpoint(output, this, resume=True) is None
    torch.save({}, output / "checkpoint-9" / "rng_state_1.pth")
    assert resume.checkpoint(output, this, resume=True) == str(output / "checkpoint-9")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--settings", "roberta-base-scripts"],
         ["settings was roberta-base, is roberta-base-scripts", "alpha was 8, is 16"]),
        (["--lr", "1"], ["lr was 0.0005, is 1.0"]),
        (["--rank", "4"], ["rank was 8, is 4"]),
        (["--alpha", "4"], ["alpha was 8, is 4.0"]),
        (["--dropout", "0.1"], ["dropout was 0.0, is 0.1"]),
        (["--targets", "key"], ["targets was None, is ['key']"]),
        (["--method", "full"], ["method was lora, is full"]),
        (["--model", "a/roberta-base"], ["model was roberta-base, is a/roberta-base"]),
        (["--seed", "1"], ["seed was 0, is 1"]),
        (["--precision", "bf16"], ["precision was fp32, is bf16"]),
        (["--data", "folder"], ["data was nyu-mll/glue, is folder"]),
        (["--train", "2"], ["train was None, is 2"]),
        (["--keep", "last"], ["keep was best, is last"]),
        (["--accumulation", "2"], ["accumulation was 1, is 2"]),
        (["--group-by-length"], ["group_by_length was False, is True"]),
        (["--start-from", "mnli"], ["start_from was None, is mnli"]),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_what_it_changes(output, flags, named):
    for asked in (True, False):
        with pytest.raises(InputError, match="holds another run: ") as error:
            resume.checkpoint(output, record(*flags), asked)
        assert all(name in str(error.value) for name in named)
        assert str(error.value).count(" was ") == len(named)


def test_other_examples_weights_devices_and_processes_are_another_run(output, monkeypatch):
    other = Data(DATA.train, {"dev": [Example("d", None, 1)]})
    with pytest.raises(InputError, match="data_hash was"):
        resume.checkpoint(output, record(data=other), resume=True)
    with pytest.raises(InputError, match="model_hash was a, is b"):
        resume.checkpoint(output, record(model_hash="b"), resume=True)
    with pytest.raises(InputError, match="device was cpu, is cuda"):
        resume.checkpoint(output, record(device="cuda"), resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="processes was 1, is 2"):
        resume.checkpoint(output, record(), resume=True)


@pytest.mark.parametrize("flag", ["--adapter", "--start-from"])
def test_other_weights_at_the_same_path_are_another_run(output, tmp_path, flag):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir()
    save_file({"a": torch.zeros(100)}, file)
    for path in (file, file.parent):
        save_file({"a": torch.zeros(100)}, file)
        (output / runs.RECORD).write_text(json.dumps(record(flag, str(path))))
        assert resume.checkpoint(output, record(flag, str(path)), resume=True)
        save_file({"a": torch.ones(100)}, file)
        key = flag[2:].replace("-", "_")
        with pytest.raises(InputError, match=f"another run: {key}_hash was [0-9a-f]{{12}}, is"):
            resume.checkpoint(output, record(flag, str(path)), resume=True)


def test_weights_are_found_in_files_and_folders(tmp_path):
    assert resume.weights_hash(str(tmp_path)) is resume.weights_hash("no/such/name") is None
    (tmp_path / "a.bin").write_bytes(b"a")
    alone = resume.weights_hash(str(tmp_path))
    assert alone == hashlib.sha256(b"a").hexdigest()[:12]
    assert alone == resume.weights_hash(str(tmp_path / "a.bin"))
    (tmp_path / "b.safetensors").write_bytes(b"b")
    assert resume.weights_hash(str(tmp_path)) == hashlib.sha256(b"b").hexdigest()[:12]
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        resume.weights_hash(str(tmp_path))


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
@pytest.mark.parametrize("left", ["checkpoint-10", "trained", "results.json"])
def test_what_nobody_knows_of_is_refused(tmp_path, left, content):
    (tmp_path / left).mkdir()
    if content is not None:
        (tmp_path / runs.RECORD).write_text(content)
    for asked in (True, False):
        with pytest.raises(InputError, match=f"no {runs.RECORD}"):
            resume.checkpoint(tmp_path, THIS, asked)


@pytest.mark.parametrize("left", ["trained", "results.json"])
def test_a_run_without_checkpoints_is_not_overwritten(tmp_path, left):
    (tmp_path / left).mkdir()
    (tmp_path / runs.RECORD).write_text(json.dumps(THIS))
    for asked in (True, False):
        with pytest.raises(InputError, match=r"holds another run: lr was 0\.0005, is 1\.0"):
            resume.checkpoint(tmp_path, record("--lr", "1"), asked)
    with pytest.raises(InputError, match="holds this run"):
        resume.checkpoint(tmp_path, THIS, resume=False)
    assert resume.checkpoint(tmp_path, THIS, resume=True) is None


def test_a_run_that_left_nothing_is_in_nobodys_way_but_not_resumed_as_another(tmp_path):
    (tmp_path / runs.RECORD).write_text(json.dumps(THIS))
    other = record("--lr", "1")
    assert resume.checkpoint(tmp_path, other, resume=False) is None
    assert resume.checkpoint(tmp_path, THIS, resume=False) is None
    assert resume.checkpoint(tmp_path, THIS, resume=True) is None
    with pytest.raises(InputError, match="holds another run"):
        resume.checkpoint(tmp_path, other, resume=True)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_ended_before_its_first_checkpoint_is_in_nobodys_way(tmp_path, status):
    (tmp_path / runs.RECORD).write_text(json.dumps(THIS))
    (tmp_path / runs.RESULTS).write_text(json.dumps({**THIS, "status": status}))
    assert resume.checkpoint(tmp_path, record("--lr", "1"), resume=False) is None


def test_a_run_has_ended_where_its_results_and_its_weights_are(tmp_path):
    file = tmp_path / "results.json"
    (tmp_path / "trained").mkdir()
    for status in ("interrupted", "failed"):
        file.write_text(json.dumps({**THIS, "status": status}))
        assert resume.finished(tmp_path, THIS) is None
    (tmp_path / "trained").rmdir()
    file.write_text(json.dumps({**THIS, "dev": {}, "status": "complete"}))
    assert resume.finished(tmp_path, THIS) is None
    (tmp_path / "trained").mkdir()
    assert resume.finished(tmp_path, THIS) == {**THIS, "dev": {}, "status": "complete"}
    assert resume.finished(tmp_path, record("--seed", "1")) is None
    file.write_text(file.read_text()[:-9])
    assert resume.finished(tmp_path, THIS) is None


@pytest.mark.parametrize("best", [8, 9])
def test_the_best_epoch_has_to_be_there(output, best):
    (output / "checkpoint-10" / "trainer_state.json").write_text(
        json.dumps({"global_step": 10, "best_global_step": best})
    )
    assert best == 8 or resume.checkpoint(output, THIS, resume=True)
    (output / "checkpoint-9" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=f"checkpoint-{best}, the best before checkpoint-10, is"):
        resume.checkpoint(output, THIS, resume=True)
    last = record("--keep", "last")
    (output / runs.RECORD).write_text(json.dumps(last))
    assert resume.checkpoint(output, last, resume=True)
