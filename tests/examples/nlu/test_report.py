"""The paper's table of many runs: what is one row of it, and what is refused."""

import json
from dataclasses import asdict

import pytest

from examples import runs
from examples.errors import InputError
from examples.nlu import report
from examples.nlu.tasks import TASKS, settings
from tests.examples.nlu.test_resume import record


def result(task="sst2", score=0.5, name="roberta-base", changes=None, **other) -> dict:
    """What results.json holds of a run of the README's loop, as far as the report reads it."""
    row = asdict(settings(name, task))
    start = row["start"] and f"runs/mnli/lora-{other.get('seed', 0)}/trained"
    return {
        **record(), "task": task, "start_from": start, "settings": row | (changes or {}),
        "trainable_parameters": 887042, "paper_score": score,
        "status": "complete", **other,
    }  # fmt: skip


def rows(*results) -> list[list[str]]:
    """Cells of the table's rows, without the empty ones."""
    lines = report.table({str(i): one for i, one in enumerate(results)}).splitlines()[2:]
    return [[cell.strip() for cell in line.split("|") if cell.strip()] for line in lines]


def test_every_field_of_a_record_is_accounted_for():
    of_one_seed_or_task = {"start_from_hash", "data", "training_examples"}
    assert set(record()) - report.NEEDED == of_one_seed_or_task
    assert report.UNCHANGED.items() <= record().items()


def test_the_report_is_the_papers_table(tmp_path, capsys):
    row = dict(zip(TASKS, (87.5, 95.1, 89.7, 63.4, 93.3, 90.8, 86.6, 91.5), strict=True))
    for task, value in row.items():
        for seed, shift in enumerate((-1, 0, 2)):
            folder = tmp_path / task / str(seed)
            folder.mkdir(parents=True)
            one = result(task, (value + shift) / 100, seed=seed, data_hash=task)
            runs.write_json(one, folder / "results.json")
    assert report.main([str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "| roberta-base | lora | roberta-base | 887,042 "
        "| 87.5 | 95.1 | 89.7 | 63.4 | 93.3 | 90.8 | 86.6 | 91.5 | 87.2 |"
    )
    assert report.main([str(tmp_path / "rte" / "0")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("|  |  | 85.6 |  |  |")


def test_runs_of_one_row_differ_in_their_seed_alone():
    large = {"task": "rte", "name": "roberta-large"}
    found = rows(
        result(**large), result(**large, score=0.7, seed=1),
        result("rte", 0.2, "roberta-large-restricted"),
        result(**large, score=0.9, changes={"lr": 1.0}, targets=["query"]),
        result(**large, score=None),
    )  # fmt: skip
    assert [row[2:] for row in found] == [
        ["roberta-large", "887,042", "60.0"],
        ["roberta-large-restricted", "887,042", "20.0"],
        ["roberta-large, lr 1.0, targets ['query']", "887,042", "90.0"],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"keep": "none"}, {"precision": "bf16"}, {"group_by_length": True}, {"accumulation": 2},
        {"processes": 2}, {"adapter": "some.bin"}, {"start_from": "mnli"}, {"train": 9},
    ],
    ids=str,
)  # fmt: skip
def test_another_experiment_is_a_row_that_names_what_differs(change):
    plain, other = rows(result(), result(**change, seed=1))
    ((key, value),) = change.items()
    assert plain[2] == "roberta-base"
    assert other[2] == f"roberta-base, {key} {value}"


def test_from_mnli_or_not_is_a_row_of_its_own():
    found = rows(result("mnli"), result("rte"), result("rte", start_from=None))
    assert [row[2] for row in found] == ["roberta-base", "roberta-base, start_from None"]
    # Of the methods, LoRA alone has an adapter to start from.
    full = {"method": "full", "start_from": None}
    assert [row[2] for row in rows(result("mnli", **full), result("rte", **full))] == [
        "roberta-base"
    ]


def test_other_weights_devices_and_data_of_the_same_task_are_rows_of_their_own():
    assert len(rows(result("sst2", data_hash="a"), result("cola", data_hash="b"))) == 1
    for key in ("model_hash", "device", "data_hash"):
        found = rows(result(**{key: "a"}), result(seed=1, **{key: "b"}))
        assert [row[2] for row in found] == [f"roberta-base, {key} {x}" for x in "ab"]
        # Of two models both are the only ones of their name.
        assert len(rows(result(**{key: "a"}), result(model="m", **{key: "b"}))) == 2


def test_the_same_run_does_not_count_twice():
    with pytest.raises(InputError, match=r"^1: the same task, seed and settings as 0: keep one"):
        rows(result(), result(score=0.7))
    rows(result(), result(score=None))  # one that the table does not have


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not of this version of examples.nlu: no 'accumulation'"),
        (json.dumps({**result(), "settings": {"name": "bert"}}), "--settings must be one of"),
    ],
)
def test_what_is_no_run_is_named_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "results.json"
    file.write_text(content)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: {message}")
    assert error.count("\n") == 1


def test_a_field_that_is_missing_is_named(tmp_path, capsys):
    old = result()
    del old["paper_score"]
    runs.write_json(old, tmp_path / "results.json")
    assert report.main([str(tmp_path)]) == 2
    assert "examples.nlu: no 'paper_score'" in capsys.readouterr().err


def test_runs_that_do_not_count_are_named_with_the_reason(tmp_path, capsys):
    for name, one in (
        ("counts", result()),
        ("held-out", result(score=None, seed=1)),
        ("stopped", result(score=None, seed=2, status="interrupted")),
    ):
        runs.write_json(one, tmp_path / name / "results.json")
    assert report.main([str(tmp_path)]) == 0
    printed, error = capsys.readouterr()
    assert len(printed.splitlines()) == 3  # two of the heading
    held, stopped = (tmp_path / name / "results.json" for name in ("held-out", "stopped"))
    assert error.splitlines() == [
        f"{held}: left out: it was not measured on GLUE's development set",
        f"{stopped}: left out: the run is interrupted",
    ]
    assert report.main([str(held.parent)]) == 0
    assert capsys.readouterr().out == f"{held.parent}: none of its runs counts\n"


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "told"),
    [("lora", "LoRA of rank 8"), ("full", "full fine-tuning"), ("head", "the head alone")],
)
def test_the_picture_says_what_trained(monkeypatch, tmp_path, method, told):
    titles = []
    monkeypatch.setattr(report, "curves", lambda path, title, *_: titles.append(title))
    result = {
        "model": "models/roberta-base", "method": method, "settings": {"rank": 8}, "log": [],
        "dev": {"dev": {}},
    }  # fmt: skip
    report.draw(result, TASKS["sst2"], tmp_path)
    assert titles == [f"roberta-base on SST-2, {told}"]
