"""The eight GLUE tasks of the paper, and the hyperparameters of each per model (settings.tsv)."""

import contextlib
import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.errors import InputError

__all__ = ["TASKS", "Settings", "Task", "settings"]

SETTINGS_FILE = Path(__file__).with_name("settings.tsv")


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    texts: per text that the model reads, the names that its column has on the hub and in GLUE's
    own files. labels: names of the classes in the order of the hub, none where the label is a
    number from 0 to 5. metrics: GLUE's, the one that the paper reports first. dev: name of each
    development set -> stem of its file; on the hub a set is called validation instead of dev.
    """

    name: str
    title: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: Mapping[str, str]

    @property
    def outputs(self) -> int:
        """Width of the head: one per class, or one for a number."""
        return max(1, len(self.labels))


ONE_DEV_SET = {"dev": "dev"}
ENTAILMENT = ("entailment", "not_entailment")
PAIR = (("sentence1", "#1 String"), ("sentence2", "#2 String"))

TASKS = {
    task.name: task
    for task in (
        Task(
            "mnli", "MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")),
            ("entailment", "neutral", "contradiction"), ("accuracy",),
            {"matched": "dev_matched", "mismatched": "dev_mismatched"},
        ),
        Task(
            "sst2", "SST-2", (("sentence",),), ("negative", "positive"), ("accuracy",), ONE_DEV_SET
        ),
        Task(
            "mrpc", "MRPC", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), ONE_DEV_SET
        ),
        Task(
            "cola", "CoLA", (("sentence",),), ("unacceptable", "acceptable"), ("matthews",),
            ONE_DEV_SET,
        ),
        Task(
            "qnli", "QNLI", (("question",), ("sentence",)), ENTAILMENT, ("accuracy",), ONE_DEV_SET
        ),
        Task(
            "qqp", "QQP", (("question1",), ("question2",)), ("not_duplicate", "duplicate"),
            ("accuracy", "f1"), ONE_DEV_SET,
        ),
        Task("rte", "RTE", PAIR, ENTAILMENT, ("accuracy",), ONE_DEV_SET),
        Task("stsb", "STS-B", PAIR, (), ("pearson", "spearman"), ONE_DEV_SET),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one run. warmup: a share of all steps below 1, else steps.

    name: of the rows of settings.tsv that they come from.
    cls_dropout: None is the model's own. start: the task whose adapter the run starts from.
    """

    name: str
    batch_size: int
    epochs: float
    lr: float
    weight_decay: float
    warmup: float
    cls_dropout: float | None
    rank: int
    alpha: float
    max_length: int
    start: str | None


def settings(name: str, task: str) -> Settings:
    """The row of settings.tsv for this model and task; InputError names the models it has."""
    with SETTINGS_FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        if (row["settings"], row["task"]) == (name, task):
            values = {key: _value(value) for key, value in row.items()}
            return Settings(name, **{k: values[k] for k in Settings.__annotations__ if k != "name"})
    names = dict.fromkeys(row["settings"] for row in rows)
    raise InputError(f"--settings must be one of {', '.join(names)}, got {name!r}")


def _value(text: str) -> int | float | str | None:
    if text == "-":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
