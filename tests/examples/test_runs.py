"""How a run ends, in results.json; --device; what is told while a model trains."""

import json
import os

import pytest

from examples import runs
from examples.devices import is_cpu, see_only
from examples.errors import InputError
from examples.progress import epoch_line, in_words


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, {"status": "complete"}),
        (KeyboardInterrupt(), {"status": "interrupted"}),
        (RuntimeError("out of\nmemory"), {"status": "failed", "error": "out of memory"}),
        (SystemExit(), {"status": "failed", "error": "SystemExit"}),
    ],
    ids=["end", "Ctrl-C", "error", "exit"],
)
def test_results_are_written_whatever_ends_a_run(tmp_path, error, expected):
    def run():
        with runs.reported(tmp_path / "results.json", {"lr": 1}) as results:
            results["step"] = 3
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {"lr": 1, "step": 3, **expected}
    assert (runs.has_ended(tmp_path) is None) == (error is not None)


def test_what_is_no_number_is_null(tmp_path):
    runs.write_json({"losses": [1.5, float("nan"), float("inf")]}, tmp_path / "results.json")
    assert runs.read_json(tmp_path / "results.json") == {"losses": [1.5, None, None]}


def test_a_process_that_leaves_it_to_another_writes_nothing(tmp_path):
    with runs.reported(tmp_path / "results.json", {}, lambda: False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_versions_need_no_installed_package(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("torch", "no-such-package"))
    found = runs.versions()
    assert found["no-such-package"] is None
    assert found["lora_kernels"]
    assert found["torch"]


@pytest.mark.parametrize(
    ("name", "seen", "expected"),
    [
        ("auto", None, None),
        ("cuda", "3,4", "3,4"),
        ("cuda:1", None, "1"),
        ("cuda:1", "3,4", "4"),
    ],
)
def test_of_several_gpus_one_is_seen(monkeypatch, name, seen, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    see_only(name)
    assert (os.environ["CUDA_VISIBLE_DEVICES"] or None) == expected


@pytest.mark.parametrize("name", ["cuda:2", "cuda:x", "cpu:1"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(InputError, match=f"--device {name}: must be auto, cpu, cuda or cuda:N"):
        see_only(name)


def test_a_launcher_gives_gpus_to_its_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    see_only("cuda")
    with pytest.raises(InputError, match="has a GPU of its own: give cuda"):
        see_only("cuda:0")


def test_a_device_of_another_kind_is_refused():
    assert is_cpu("cpu")
    with pytest.raises(InputError, match="--device nonsense: there is "):
        is_cpu("nonsense")


def test_an_epoch_is_told_with_the_time_that_is_left():
    measured = {"loss": "0.41", "accuracy": "83.3 %"}
    line = epoch_line(2, 5, 40.0, measured)
    assert line == "epoch 2 of 5: loss 0.41, accuracy 83.3 %, about 2 min left"
    assert epoch_line(5, 5, 40.0, measured).endswith("accuracy 83.3 %")
    assert [in_words(s) for s in (0.4, 59, 61, 3599, 9000)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "2 h 30 min",
    ]  # fmt: skip
