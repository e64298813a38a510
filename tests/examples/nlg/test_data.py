"""The three formats, grouping, splitting, and token ids with labels on the completion only."""

import json
import sys

import pytest

from examples.errors import InputError
from examples.nlg import data
from examples.nlg.data import Example, Group

DART = [
    {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill", "LOCATION", "NC"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "a", "text": "One."}, {"source": "b", "text": "Two."}],
    }
]


def webnlg(category: str, *texts: tuple[str, str]) -> dict:
    return {
        "category": category,
        "lexicalisations": [{"comment": comment, "lex": text} for comment, text in texts],
        "modifiedtripleset": [
            {"object": "Jacob_Bundsgaard", "property": "leaderName", "subject": "Aarhus"},
            {"object": "Denmark", "property": "isPartOf", "subject": "Aarhus"},
        ],
        "originaltriplesets": {"originaltripleset": [[{"object": "x"}]]},
    }


WEBNLG = {"entries": [{"1": webnlg("Airport", ("good", "A."), ("toFix", "B."), ("good", "C."))}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ---- formats ----


def test_e2e_lines(tmp_path):
    path = write(
        tmp_path / "e2e.txt", "\ufeffname : A | near : Café||One , two . \n\nname : B||Three"
    )
    assert data.load("e2e", path) == [
        Example("name : A | near : Café", "One , two ."),
        Example("name : B", "Three"),
    ]


def test_dart_lower_cases_the_relation_only(tmp_path):
    context = "Mars Hill College : joined : 1973 | Mars Hill : location : NC"
    assert data.load("dart", write(tmp_path / "dart.json", DART)) == [
        Example(context, "One."),
        Example(context, "Two."),
    ]


def test_blank_texts_are_left_out(tmp_path):
    """TER divides by the words of a reference, and there is nothing to learn from them."""
    rows = [DART[0] | {"annotations": [{"text": text} for text in ("One.", "", " ")]}]
    examples = data.load("dart", write(tmp_path / "dart.json", rows))
    assert [example.completion for example in examples] == ["One."]


def test_webnlg_takes_modified_triples_as_they_are_and_good_texts_only(tmp_path):
    context = "Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : isPartOf : Denmark"
    assert data.load("webnlg", write(tmp_path / "webnlg.json", WEBNLG)) == [
        Example(context, "A.", "Airport"),
        Example(context, "C.", "Airport"),
    ]


@pytest.mark.parametrize(
    ("task", "content", "place"),
    [
        ("e2e", "name : A||One\nname : B\n", ":2: "),
        ("e2e", "name : A||One||Two", ":1: "),
        ("e2e", "||One", ":1: "),
        ("e2e", "", ": no examples"),
        ("e2e", "\n", ": no examples"),
        ("dart", "", "no JSON"),
        ("dart", "[]", ": no examples"),
        ("dart", "{}", "must be a list"),
        ("dart", "null", "must be a list"),
        ("dart", [DART[0] | {"annotations": [{"text": None}]}], "entry 1: "),
        ("webnlg", {"entries": []}, ": no examples"),
        ("dart", '[{"annotations": []}]', "entry 1: KeyError: 'tripleset'"),
        ("dart", "name : A||One", "no JSON"),
        ("webnlg", DART, "entries"),
        ("webnlg", {"entries": [{"1": {"category": "City"}}]}, "entry 1: KeyError"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, task, content, place):
    path = write(tmp_path / "bad", content)
    with pytest.raises(InputError, match="bad") as error:
        data.load(task, path)
    assert str(error.value).startswith(str(path))
    assert place in str(error.value)


# ---- the hub's formats, as a data set of the hub looks to `datasets` ----


HUB = {
    "e2e": {
        "meaning_representation": "name[The Eagle], eatType[pub], priceRange[less than £20], "
        "customer rating[5 out of 5], familyFriendly[no], near[Burger King]",
        "human_reference": "One.",
    },
    "dart": {
        "tripleset": [["S", "REL", "O"], ["T", "OTHER", "P"]],
        "annotations": {"source": ["a", "b"], "text": ["One.", "Two."]},
    },
    "webnlg": {
        "category": "Comet",
        "modified_triple_sets": {"mtriple_set": [["S | relOf | O", "T | p | Q"]]},
        "lex": {"comment": ["good", "bad"], "text": ["One.", "Two."]},
    },
}
FROM_HUB = {
    "e2e": [
        Example(
            "name : The Eagle | Type : pub | price : less than £20 | customer rating : 5 out of 5 "
            "| family friendly : no | near : Burger King",
            "One.",
        )
    ],
    "dart": [Example("S : rel : O | T : other : P", text) for text in ("One.", "Two.")],
    "webnlg": [Example("S : relOf : O | T : p : Q", "One.", "Comet")],
}


@pytest.mark.parametrize("task", data.TASKS)
def test_rows_of_the_hub(tmp_path, task):
    pytest.importorskip("datasets")
    write(tmp_path / "validation.jsonl", json.dumps(HUB[task]))
    assert data.load(task, tmp_path, "validation") == FROM_HUB[task]
    with pytest.raises(InputError, match="'test'"):
        data.load(task, tmp_path, "test")


def test_without_datasets_a_missing_file_is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"none.txt: no such file; `pip install datasets`"):
        data.load("e2e", tmp_path / "none.txt")


# ---- the real files ----


@pytest.mark.parametrize(
    ("task", "path", "examples", "contexts", "first"),
    [
        (
            "e2e", "e2e/valid.txt", 4672, 547,
            Example(
                "name : Alimentum | area : city centre | family friendly : no",
                "There is a place in the city centre , Alimentum , that is not family - friendly .",
            ),
        ),
        (
            "dart", "dart/dart-v1.1.1-full-dev.json", 6980, 2721,
            Example(
                "Mars Hill College : joined : 1973 | "
                "Mars Hill College : location : Mars Hill, North Carolina",
                "A school from Mars Hill, North Carolina, joined in 1973.",
            ),
        ),
        (
            "webnlg", "webnlg/dev.json", 2258, 870,
            Example(
                "Aarhus : leaderName : Jacob_Bundsgaard",
                "The leader of Aarhus is Jacob Bundsgaard.",
                "Airport",
            ),
        ),
    ],
)  # fmt: skip
def test_the_real_files(real_data, task, path, examples, contexts, first):
    rows = data.load(task, real_data(path))
    assert len(rows) == examples
    assert rows[0] == first
    groups = data.group(rows)
    assert len(groups) == contexts
    assert sum(len(item.references) for item in groups) == examples
    assert {item.category for item in groups} <= {None, *data.SEEN_CATEGORIES}


# ---- grouping and splitting ----


def test_group_keeps_the_order_of_contexts_and_of_texts():
    rows = [Example("a", "1", "City"), Example("b", "2"), Example("a", "3", "City")]
    assert data.group(rows) == [Group("a", ("1", "3"), "City"), Group("b", ("2",))]


def test_split_keeps_every_context_whole_and_repeats_with_the_seed(restaurants):
    train, held = data.split_by_context(restaurants, 0.1, seed=0)
    assert (train, held) == data.split_by_context(restaurants, 0.1, seed=0)
    assert held != data.split_by_context(restaurants, 0.1, seed=1)[1]
    assert sorted(map(str, train + held)) == sorted(map(str, restaurants))
    contexts = [{example.context for example in part} for part in (train, held)]
    assert not contexts[0] & contexts[1]
    assert len(contexts[1]) == round(0.1 * 24)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(InputError, match="1 of 1"):
        data.split_by_context([Example("a", "1"), Example("a", "2")], 0.1, seed=0)


# ---- encode ----


def test_labels_cover_the_completion_and_the_end_of_text(tokenizer, restaurants):
    (row,) = data.encode(tokenizer, restaurants[:1], 512)
    context = tokenizer(restaurants[0].context)["input_ids"]
    completion = tokenizer(" " + restaurants[0].completion)["input_ids"]
    end = tokenizer.eos_token_id
    assert row["input_ids"] == [*context, end, *completion, end]
    assert row["labels"] == [-100] * (len(context) + 1) + [*completion, end]


def test_long_examples_are_cut_and_those_without_a_completion_left_out(tokenizer, restaurants):
    context = len(tokenizer(restaurants[0].context)["input_ids"]) + 1
    (row,) = data.encode(tokenizer, restaurants[:1], context + 2)
    assert len(row["input_ids"]) == len(row["labels"]) == context + 2
    assert row["labels"][:-2] == [-100] * context
    assert data.encode(tokenizer, restaurants[:1], context) == []


def test_gpt2s_own_vocabulary(real_data):
    from examples.nlg.model import load_tokenizer

    tokenizer = load_tokenizer(str(real_data("gpt2_bpe")))
    (row,) = data.encode(tokenizer, [Example("name : Alimentum", "Alimentum is here .")], 512)
    assert row["input_ids"] == [
        *(3672, 1058, 978, 3681, 388, 50256), *(978, 3681, 388, 318, 994, 764, 50256),
    ]  # fmt: skip
    assert tokenizer("\n\n")["input_ids"] == [628]
