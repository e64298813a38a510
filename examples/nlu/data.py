"""Labelled sentences and pairs: from TSV files, or from the hub through datasets."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.errors import InputError
from examples.finetune.data import split
from examples.nlu.tasks import Task

__all__ = ["Data", "Example", "load"]

LABEL_COLUMNS = ("label", "gold_label", "Quality", "is_duplicate", "score")
# GLUE's own CoLA files have no header.
COLA_COLUMNS = ["source", "label", "star", "sentence"]
MAX_INCOMPLETE = 0.01  # of the rows of a file; GLUE's QQP has a few


class Example(NamedTuple):
    sentence: str
    pair: str | None
    label: int | float


class Data(NamedTuple):
    """Examples to train on, and sets to measure on by name; epochs are compared on the first."""

    train: list[Example]
    dev: dict[str, list[Example]]


def load(
    task: Task,
    source: str,
    held_out: int | None = None,
    validation: int | None = None,
    train: int | None = None,
) -> Data:
    """The examples of task.

    source: a folder with train.tsv and dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv), with
    the columns of the hub or of GLUE's own files; one such file, of which held_out examples (a
    quarter, at most 2,000, where None) become the set "held_out" and, if asked for, as many as
    validation says the set "validation" before it; or what datasets.load_dataset takes. train: how
    many to train on, all where None.
    Raises: InputError, which names the file, the line and the value.
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".tsv":
        return _split(read(path, task), source, held_out, validation, train)
    if held_out is not None or validation is not None:
        raise InputError("--held-out and --validation: only for --data that is one TSV file")
    if (path / "train.tsv").is_file():
        data = Data(
            read(path / "train.tsv", task),
            {name: read(path / f"{stem}.tsv", task) for name, stem in task.dev.items()},
        )
    else:
        data = _from_datasets(task, source)
    if train is not None and train > len(data.train):
        raise InputError(f"--train {train} asks for more than the {len(data.train)} examples there")
    return data._replace(train=data.train[:train])


def _split(rows: list[Example], source: str, held_out, validation, train) -> Data:
    rest, held = split(rows, source, held_out, None if validation else train)
    if not validation:
        return Data(rest, {"held_out": held})
    rest, chosen = split(rest, source, validation, train)
    return Data(rest, {"validation": chosen, "held_out": held})


def read(path: Path, task: Task) -> list[Example]:
    """The examples of one TSV file. Quotes have no meaning, as in GLUE.

    Rows that lack a field are left out, with a message; more than one in a hundred is an error.
    """
    lines = _lines(path)
    header = lines[0].split("\t") if lines else []
    if task.name == "cola" and "sentence" not in header and len(header) == len(COLA_COLUMNS):
        header = COLA_COLUMNS
        lines.insert(0, "")
    columns = [_column(path, header, names) for names in (*task.texts, LABEL_COLUMNS)]
    examples, incomplete = [], []
    for number, line in enumerate(lines[1:], start=2 - (header is COLA_COLUMNS)):
        fields = line.split("\t")
        row = [fields[i].strip() if i < len(fields) else "" for i in columns]
        if all(row):
            examples.append(_example(task, row[:-1], row[-1], f"{path}:{number}"))
        elif line.strip():
            incomplete.append(number)
    if len(incomplete) > MAX_INCOMPLETE * (len(examples) + len(incomplete)):
        raise InputError(f"{path}:{incomplete[0]}: a text or the label is missing")
    if incomplete:
        print(f"{path}: rows without text or label left out: {incomplete}", file=sys.stderr)
    if not examples:
        raise InputError(f"{path}: holds no examples")
    return examples


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines() of a str: sentences contain line separators of Unicode.
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return [line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(lines)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.object[:40]!r}") from None


def _column(path: Path, header: Sequence[str], names: Sequence[str]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise InputError(f"{path}:1: no column {' or '.join(map(repr, names))} among {list(header)}")


def _example(task: Task, texts: Sequence, label, where: str) -> Example:
    sentence, pair = (*texts, None)[:2]
    return Example(sentence, pair, _label(task, label, where))


def _label(task: Task, label, where: str) -> int | float:
    """The index of a class given by index or name, or a number from 0 to 5."""
    if label in task.labels:
        return task.labels.index(label)
    try:
        value = int(label) if task.labels else float(label)
        if 0 <= value < len(task.labels) or (not task.labels and 0 <= value <= 5):
            return value
    except ValueError:
        pass
    allowed = f"one of {', '.join(task.labels)}" if task.labels else "a number from 0 to 5"
    raise InputError(f"{where}: the label must be {allowed}, got {label!r}")


def _from_datasets(task: Task, source: str) -> Data:
    try:
        from datasets import load_dataset  # seconds to import, and an extra of its own
    except ImportError:
        raise InputError(f"--data {source}: `pip install datasets` brings what it needs") from None
    try:
        sets = load_dataset(source, task.name)
    except Exception as error:  # connection, missing data set, missing configuration: all its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"--data {source}: {reason}") from None

    def examples(name: str) -> list[Example]:
        if name not in sets:
            raise InputError(f"--data {source}: no split {name!r} among {list(sets)}")
        rows, where = sets[name], f"{source}, {task.name}, {name}"
        header = rows.column_names
        columns = [header[_column(where, header, names)] for names in (*task.texts, LABEL_COLUMNS)]
        values = zip(*(rows[column] for column in columns), strict=True)
        return [
            _example(task, texts, label, f"{where}, row {i}")
            for i, (*texts, label) in enumerate(values)
        ]

    dev = {name: examples(stem.replace("dev", "validation")) for name, stem in task.dev.items()}
    return Data(examples("train"), dev)
