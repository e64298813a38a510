"""Reading labelled sentences, holding some back, batching by length."""

import random
from collections import Counter

import pytest

from examples.errors import InputError
from examples.finetune import data
from examples.finetune.data import Example

HEADER = "sentence\tlabel\n"


def write(tmp_path, content: str | bytes):
    path = tmp_path / "some.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def examples(sizes: dict[int, int]) -> list[Example]:
    return [Example(f"{label} number {i}", label) for label, n in sizes.items() for i in range(n)]


# ---- load ----


def test_load_reads_sentences_and_labels_in_order(tmp_path):
    path = write(tmp_path, HEADER + "sort of amazing \t1\na \"quoted' dog\t0\n")
    assert data.load(path) == [Example("sort of amazing", 1), Example("a \"quoted' dog", 0)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfsentence\tlabel\na\t0\nb\t1\n",
        b"sentence\tlabel\r\na\t0\r\nb\t1\r\n",
        b"sentence\tlabel\na\t0\n\n\nb\t1",
    ],
    ids=["byte order mark", "CRLF", "blank lines and no last newline"],
)
def test_load_takes_what_other_programs_write(tmp_path, content):
    assert data.load(write(tmp_path, content)) == [Example("a", 0), Example("b", 1)]


def test_load_keeps_line_separators_of_unicode_inside_a_sentence(tmp_path):
    path = write(tmp_path, HEADER + "one\u2028line\t0\nb\t1\n")
    assert data.load(path)[0].sentence == "one\u2028line"


@pytest.mark.parametrize(
    ("content", "line", "value"),
    [
        ("", 1, "empty file"),
        ("a\t0\nb\t1\n", 1, "['a', '0']"),
        (HEADER + "a\t0\nb\tyes\n", 3, "'yes'"),
        (HEADER + "a\t0\nb\t1.0\n", 3, "'1.0'"),
        (HEADER + "a\t0\nb\t\n", 3, "''"),
        (HEADER + "a\t0\n\nb 1\n", 4, "['b 1']"),
        (HEADER + "a\t0\nb\t1\t2\n", 3, "['b', '1', '2']"),
        (HEADER + "a\t0\n  \t1\n", 3, "['  ', '1']"),
        ((HEADER + "a\t0\n").encode() + b"caf\xe9\t1\n", 3, r"b'caf\xe9\t1'"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_value(tmp_path, content, line, value):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        data.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert value in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "value"), [("a\t1\nb\t1\n", "[1]"), ("", "0 examples")])
def test_fewer_than_two_classes_are_refused(tmp_path, rows, value):
    path = write(tmp_path, HEADER + rows)
    with pytest.raises(InputError, match="two classes") as error:
        data.load(path)
    assert str(path) in str(error.value)
    assert value in str(error.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(InputError, match="cannot be read") as error:
            data.load(path)
        assert str(path) in str(error.value)


def test_the_own_sentences_are_distinct_and_balanced():
    own = data.load(data.OWN_SENTENCES)
    assert len({example.sentence.casefold() for example in own}) == len(own) >= 400
    counts = Counter(example.label for example in own)
    assert set(counts) == {0, 1}
    assert counts[0] == counts[1]


# ---- split ----


def test_split_is_the_same_every_time_and_loses_nothing():
    rows = examples({0: 60, 1: 40})
    train, held = data.split(rows, "some.tsv")
    assert (train, held) == data.split(list(rows), "some.tsv")
    assert len(held) == 25
    assert sorted(train + held) == sorted(rows)
    assert train + held != rows


@pytest.mark.parametrize(("size", "held_out"), [(40, 10), (8000, 2000), (9000, 2000)])
def test_a_quarter_but_at_most_2000_are_held_out(size, held_out):
    _, held = data.split(examples({0: size // 2, 1: size // 2}), "some.tsv")
    assert len(held) == held_out


@pytest.mark.parametrize(("held_out", "train"), [(10, 30), (30, 50), (37, 7)])
def test_both_sides_keep_the_proportion_of_the_classes(held_out, train):
    parts = data.split(examples({0: 90, 1: 30, 7: 30}), "some.tsv", held_out, train)
    for part, size in zip(parts, (train, held_out), strict=True):
        counts = Counter(example.label for example in part)
        assert len(part) == size
        assert all(
            abs(counts[k] - size * share) <= 2 for k, share in {0: 0.6, 1: 0.2, 7: 0.2}.items()
        )


def test_a_held_out_sentence_is_not_trained_on_in_any_case_or_spacing():
    rows = examples({0: 20, 1: 20})
    rows += [Example(f" {e.sentence.upper().replace(' ', '  ')}", e.label) for e in rows]
    train, held = data.split(rows, "some.tsv", 20)
    plain = [{" ".join(e.sentence.lower().split()) for e in part} for part in (train, held)]
    assert not plain[0] & plain[1]
    assert len(train) < 60


@pytest.mark.parametrize(
    ("held_out", "train", "message"),
    [
        (40, None, "got 40 of 40"),
        (41, None, "got 41 of 40"),
        (0, None, "got 0 of 40"),
        (10, 31, "--train 31 asks for more than the 30"),
        (10, 1, "two classes"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(held_out, train, message):
    with pytest.raises(InputError, match=message) as error:
        data.split(examples({0: 20, 1: 20}), "some.tsv", held_out, train)
    assert str(error.value).startswith("some.tsv: ")


# ---- batches ----


def test_random_batches_hold_every_index_once_in_full_batches():
    lengths = [random.Random(1).randint(3, 60) for _ in range(1003)]
    batches = data.random_batches(lengths, 8, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert len(batches) == 126
    assert sorted(map(len, batches)) == [3] + [8] * 125


def test_random_batches_differ_from_epoch_to_epoch_and_repeat_with_the_seed():
    def epochs(seed):
        generator = random.Random(seed)
        return [data.random_batches(list(range(100)), 8, generator) for _ in range(2)]

    first, second = epochs(0)
    assert [first, second] == epochs(0)
    assert first != second
    assert epochs(1)[0] != first


def test_bucketing_spares_most_of_the_padding():
    draw = random.Random(0)
    lengths = [draw.randint(3, 60) for _ in range(3200)]

    def padding(batches):
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    unsorted = [list(range(start, start + 32)) for start in range(0, 3200, 32)]
    assert padding(data.random_batches(lengths, 32, random.Random(0))) < 0.1 * padding(unsorted)


def test_the_batches_of_an_epoch_do_not_come_in_order_of_length():
    lengths = list(range(400))
    batches = data.random_batches(lengths, 8, random.Random(0))
    assert batches != sorted(batches)


def test_sorted_batches_go_from_short_to_long():
    assert data.sorted_batches([5, 1, 4, 2, 3], 2) == [[1, 3], [4, 2], [0]]
