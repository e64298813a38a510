"""GLUE from TSV files in both layouts, and through datasets."""

import itertools

import pytest

from examples.errors import InputError
from examples.nlu.data import Example, load, read
from examples.nlu.tasks import TASKS


def write(tmp_path, *lines, name="train.tsv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# The headers are those of GLUE's own files.
@pytest.mark.parametrize(
    ("task", "header", "line", "expected"),
    [
        ("sst2", "sentence\tlabel", "so good \t1", ("so good", None, 1)),
        ("cola", None, "gj04\t0\t*\tHe run.", ("He run.", None, 0)),
        (
            "mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA "b\tB',
            ('A "b', "B", 1),
        ),
        (
            "qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWhy?\tHow?\t0",
            ("Why?", "How?", 0),
        ),
        (
            "stsb",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tnews\tf\t2012\t1\tx\ty\tA\tB\t3.750", ("A", "B", 3.75),
        ),
        (
            "mnli", "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\tfiction\tA\tB\tneutral\tcontradiction", ("A", "B", 2),
        ),
        ("mnli", "premise\thypothesis\tlabel", "A\tB\t1", ("A", "B", 1)),
        ("qnli", "index\tquestion\tsentence\tlabel", "0\tQ\tS\tnot_entailment", ("Q", "S", 1)),
        ("rte", "index\tsentence1\tsentence2\tlabel", "0\tA\tB\tentailment", ("A", "B", 0)),
    ],
)  # fmt: skip
def test_each_task_reads_its_columns(tmp_path, task, header, line, expected):
    path = write(tmp_path, *([header] if header else []), line)
    assert read(path, TASKS[task]) == [Example(*expected)]


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("sst2", ["sentence\tlabel", "a\t2"], "train.tsv:2: the label must be one of negative"),
        ("sst2", ["sentence\tlabel", "a\tyes"], "got 'yes'"),
        ("cola", ["x\t0\t\tfine", "x\t7\t\tbad"], "train.tsv:2: .*got '7'"),
        ("stsb", ["sentence1\tsentence2\tlabel", "a\tb\t5.5"], "a number from 0 to 5, got '5.5'"),
        ("stsb", ["sentence1\tsentence2\tlabel", "a\tb\tnan"], "got 'nan'"),
        ("rte", ["sentence\tlabel", "a\t0"], r"train.tsv:1: no column 'sentence1' or '#1 String'"),
        ("rte", ["sentence1\tsentence2\tlabel", "a\tb"], "train.tsv:2: a text or the label"),
        ("sst2", ["sentence\tlabel"], "no examples"),
        ("sst2", [], "train.tsv:1: no column"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, task, lines, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, *lines), TASKS[task])


def test_a_few_incomplete_rows_are_left_out_with_a_message(tmp_path, capsys):
    rows = [f"q{i}\tr{i}\t{i % 2}" for i in range(100)]
    rows[40] = "only one question"
    path = write(tmp_path, "question1\tquestion2\tis_duplicate", *rows)
    assert len(read(path, TASKS["qqp"])) == 99
    assert "left out: [42]" in capsys.readouterr().err


def test_a_folder_gives_both_sets_of_mnli(pairs):
    data = load(TASKS["mnli"], str(pairs), train=10)
    assert len(data.train) == 10
    assert {name: len(rows) for name, rows in data.dev.items()} == {"matched": 9, "mismatched": 15}
    assert data.dev["matched"][0].pair is not None


def test_more_than_a_folder_has_is_refused(pairs):
    assert len(load(TASKS["mnli"], str(pairs), train=72).train) == 72
    with pytest.raises(InputError, match="--train 73 asks for more than the 72 examples"):
        load(TASKS["mnli"], str(pairs), train=73)


def test_one_file_is_split_in_three_without_a_sentence_in_two(sst2):
    data = load(TASKS["sst2"], sst2, held_out=40, validation=20, train=60)
    parts = [data.train, data.dev["validation"], data.dev["held_out"]]
    assert [len(part) for part in parts] == [60, 20, 40]
    assert list(data.dev) == ["validation", "held_out"]
    plain = [{" ".join(row.sentence.lower().split()) for row in part} for part in parts]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(plain, 2))
    # How much is held out for validation does not change what is held out.
    assert load(TASKS["sst2"], sst2, held_out=40).dev["held_out"] == parts[2]


def test_a_folder_of_parquet_files_is_read_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0], "idx": [0, 1]}
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rte" / f"{split}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: "
        "rte/train.parquet\n  - split: validation\n    path: rte/validation.parquet\n---\n"
    )
    data = load(TASKS["rte"], str(tmp_path))
    assert data.train == data.dev["dev"] == [Example("a", "c", 1), Example("b", "d", 0)]
    with pytest.raises(InputError, match="qnli"):
        load(TASKS["qnli"], str(tmp_path))


def test_parts_are_for_one_file_only(pairs):
    with pytest.raises(InputError, match="--held-out"):
        load(TASKS["mnli"], str(pairs), held_out=3)
