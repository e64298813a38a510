"""Labelled sentences: reading them, holding some back, batching them by length."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.errors import InputError

__all__ = ["OWN_SENTENCES", "Example", "load", "random_batches", "sorted_batches", "split"]

OWN_SENTENCES = Path(__file__).with_name("sentences.tsv")
HEADER = ["sentence", "label"]
MAX_HELD_OUT = 2000
SPLIT_SEED = 0  # not --seed: runs with other seeds are judged on the same sentences
BATCHES_PER_BUCKET = 50


class Example(NamedTuple):
    sentence: str
    label: int


def load(path: str | os.PathLike) -> list[Example]:
    """The examples of a file in the layout of SST-2: the header, then sentence<TAB>label.

    Labels are integers, of two values at least. Quotes have no meaning; lines without any text
    are passed over. Raises InputError, which names the file, the line and the value.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            fields = line.decode("utf-8-sig" if number == 1 else "utf-8").split("\t")
        except UnicodeDecodeError:
            raise InputError(f"{where}: not UTF-8 text: {line[:40]!r}") from None
        if number == 1:
            if fields != HEADER:
                raise InputError(f"{where}: the header must be {HEADER}, got {fields}")
        elif line.strip():
            examples.append(_example(fields, where))
    if not lines:
        raise InputError(f"{path}:1: the header must be {HEADER}, got an empty file")
    _require_two_classes(examples, path)
    return examples


def _example(fields: list[str], where: str) -> Example:
    if len(fields) != len(HEADER):
        raise InputError(f"{where}: expected a sentence, a tab and a label, got {fields}")
    sentence, label = fields[0].strip(), fields[1]
    if not sentence:
        raise InputError(f"{where}: the sentence is empty: {fields}")
    try:
        return Example(sentence, int(label))
    except ValueError:
        raise InputError(f"{where}: the label must be an integer, got {label!r}") from None


def _require_two_classes(examples: Sequence[Example], path) -> None:
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise InputError(
            f"{path}: two classes at least are needed, got {len(examples)} examples with "
            f"labels {labels}"
        )


def split(
    examples: Sequence[Example], path, held_out: int | None = None, train: int | None = None
) -> tuple[list[Example], list[Example]]:
    """(for training, held out): disjoint, in proportion to the classes, the same on every run.

    held_out: a quarter, but no more than 2,000, where None. Of what is left, sentences that are
    also held out (but for case and spacing) are dropped, and the first ``train`` are taken.
    Raises InputError where the file at path holds too few.
    """
    if held_out is None:
        held_out = min(MAX_HELD_OUT, len(examples) // 4)
    if not 0 < held_out < len(examples):
        raise InputError(
            f"{path}: --held-out must leave examples on both sides, got {held_out} of "
            f"{len(examples)}"
        )
    mixed = _mixed(examples)
    held, rest = mixed[:held_out], mixed[held_out:]
    known = {_plain(example.sentence) for example in held}
    rest = [example for example in rest if _plain(example.sentence) not in known]
    if train is not None:
        if train > len(rest):
            raise InputError(
                f"{path}: --train {train} asks for more than the {len(rest)} examples that "
                f"--held-out {held_out} leaves"
            )
        rest = rest[:train]
    _require_two_classes(rest, path)
    return rest, held


def _mixed(examples: Sequence[Example]) -> list[Example]:
    """A fixed shuffle in which every prefix has the classes in about the same proportion."""
    shuffled = random.Random(SPLIT_SEED).sample(examples, len(examples))
    sizes = Counter(example.label for example in examples)
    seen = Counter()
    positions = []
    for example in shuffled:
        seen[example.label] += 1
        positions.append((seen[example.label] - 0.5) / sizes[example.label])
    order = sorted(range(len(shuffled)), key=positions.__getitem__)
    return [shuffled[i] for i in order]


def _plain(sentence: str) -> str:
    return " ".join(sentence.casefold().split())


def random_batches(
    lengths: Sequence[int], batch_size: int, generator: random.Random
) -> list[list[int]]:
    """Every index once, in batches of about equal length, batches and neighbours drawn anew.

    The indices are shuffled and sorted by length only within buckets of 50 batches: little padding,
    and still other company for every sentence in every epoch.
    """
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches = []
    for bucket in _chunks(order, BATCHES_PER_BUCKET * batch_size):
        bucket.sort(key=lengths.__getitem__)
        batches.extend(_chunks(bucket, batch_size))
    generator.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every index once, in batches from the shortest to the longest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return list(_chunks(order, batch_size))


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
