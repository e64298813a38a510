"""Scores against hand-counted cases and against what the official scripts print.

Official figures below are those of tuetschek/e2e-metrics (metrics/pymteval.py, which
`measure_scores.py -p` runs) and WebNLG/GenerationEval (multi-bleu-detok.perl, meteor-1.5.jar on
files, pyter) on the same sentences, the latter after the preparation of the original's
gpt2_decode.py.
"""

import math
import os
import shutil

import pytest

from examples.nlg import metrics
from examples.nlg.data import Group
from examples.nlg.metrics import Missing


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    metrics._meteor.cache_clear()


E2E = [
    "The Eagle is a family-friendly pub near Burger King, priced 20-25 pounds.",
    'Near the river, Cocum serves "English" food & costs $3.50.',
    "The Mill is cheap.",
]
E2E_REFERENCES = [
    [
        "The Eagle, a pub near Burger King, is family-friendly and costs 20-25 pounds.",
        "Near Burger King there is a family friendly pub: The Eagle.",
    ],
    [
        "Cocum serves English food near the river.",
        'For $3.50 Cocum (near the river) serves "English" food & more.',
        "English food: Cocum.",
    ],
    ["The Mill is a cheap coffee shop in the city centre."],
]
TRIPLES = [
    "Jacob Bundsgaard is the leader of Aarhus.",
    'Mars Hill College, which joined in 1973, isn\'t in "Asheville".',
]
TRIPLE_REFERENCES = [
    ["The leader of Aarhus is Jacob Bundsgaard.", "Aarhus is led by Jacob Bundsgaard."],
    ["A school from Mars Hill, North Carolina, joined in 1973."],
]


def close(value: float):
    """Sums in another order differ by float64 rounding."""
    return pytest.approx(value, rel=1e-12)


# ---- BLEU ----


def test_bleu_by_hand():
    # 5 of 6, 3 of 5, 2 of 4, 1 of 3; the lengths are equal.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert metrics.bleu(["the cat sat on the mat"], [["the cat sat on a mat"]]) == close(expected)


def test_bleu_takes_the_closest_length_and_the_shorter_of_two():
    # Every n-gram matches; 5 words against 4 or 6: 4, no penalty. Against 6 and 8: exp(1 - 6/5).
    texts, longer = ["a b c d", "a b c d e f"], "a b c d e f g h"
    assert metrics.bleu(["a b c d e"], [[*texts, longer]]) == close(100)
    assert metrics.bleu(["a b c d e"], [[texts[1], longer]]) == close(100 * math.exp(-1 / 5))


def test_bleu_without_a_common_4_gram_is_0():
    """pymteval puts 1e-15 in the place of a count of 0 and prints a positive number."""
    assert metrics.bleu(["a b c d"], [["a b c x"]]) == 0


def test_bleu_and_nist_are_those_of_the_e2e_script(without_java):
    scores = metrics.e2e(E2E, E2E_REFERENCES)
    assert scores["BLEU"] == close(100 * 0.3653647742490896)
    assert scores["NIST"] == close(5.199939663014735)


def test_bleu_and_nist_of_the_e2e_script_on_real_texts(real_data):
    """The first text of each context against the others: 547 contexts."""
    from examples.nlg import data

    groups = data.group(data.load("e2e", real_data("e2e/valid.txt")))
    predictions = [item.references[0] for item in groups]
    references = [item.references[1:] for item in groups]
    bleu = metrics.bleu(predictions, references, lowercase=True)
    assert bleu == close(100 * 0.6061390375232494)
    assert metrics.nist(predictions, references) == close(8.636431982239397)


# ---- NIST ----


def test_nist_by_hand():
    # Counts: a 2, b 1, c 1, 4 in all; ab 1, ac 1. info: a 1, b 2, ab 1. (1 + 2) / 2 + 1 / 1.
    assert metrics.nist(["a b"], [["A b", "a c"]]) == close(2.5)


def test_nist_penalty_is_a_half_at_two_thirds_of_the_length():
    # info of a and of b log2 3, of ab log2(1/1).
    assert metrics.nist(["a b"], [["a b c"]]) == close(0.5 * math.log2(3))


def test_nist_clips_matches_and_is_0_for_nothing():
    # Of two a's one is matched: info log2(2/1), over 2 words; aa is in no reference.
    assert metrics.nist(["a a"], [["a b"]]) == close(0.5)
    assert metrics.nist([""], [["a b"]]) == 0


# ---- METEOR, ROUGE-L, CIDEr ----


def test_rouge_l_by_hand():
    # Longest common subsequences: acd 3, abcd 4. Best precision 4/4, best recall 3/5 or 4/8.
    p, r, beta2 = 4 / 4, 3 / 5, 1.2**2
    score = metrics.rouge_l(["a b c d"], [["a c d e f", "a x b x c x d x"]])
    assert score == close((1 + beta2) * p * r / (r + beta2 * p))


def test_cider_by_hand():
    # Each text is its only reference, words of their own: cosine 1 for n = 1 to 4, times 10.
    texts = ["a b c d e", "v w x y z"]
    assert metrics.cider(texts, [[text] for text in texts]) == close(10)
    assert metrics.cider(texts, [[text] for text in reversed(texts)]) == 0


@pytest.mark.skipif(shutil.which("java") is None, reason="no java")
def test_meteor_and_the_tokens_of_java():
    """One test: the jar takes ten seconds to start, once a process."""
    scores = metrics.triples(TRIPLES, TRIPLE_REFERENCES)
    assert scores["METEOR"] == close(0.3544865579637992)
    assert metrics.meteor(["the eagle is a pub"], [["a bar", "the eagle is a pub"]]) == 1

    tokens, references = metrics.penn_treebank(
        ['The Vaults, near "Café Adriatic".', "", "Don't"], [["a b"], ["It isn't: here!"], ["x"]]
    )
    assert tokens == ["the vaults near café adriatic", "", "do n't"]
    assert references == [["a b"], ["it is n't here"], ["x"]]

    # Nothing but case and punctuation tells the first text from its reference.
    scores = metrics.e2e(["THE city, centre!"] * 2, [["The city centre."], ["Prices are low"]])
    assert scores["ROUGE-L"] == close(50)
    assert scores["METEOR"] == close(50)
    assert scores["CIDEr"] > 0


def test_without_java_three_metrics_are_missing_with_the_reason(without_java):
    scores = metrics.e2e(E2E, E2E_REFERENCES)
    missing = Missing("FileNotFoundError: java is not installed")
    assert [scores[name] for name in ("METEOR", "ROUGE-L", "CIDEr")] == [missing] * 3
    assert scores["BLEU"] > 0
    assert metrics.triples(TRIPLES, TRIPLE_REFERENCES)["METEOR"] == missing


DYING = "echo Killed >&2"
DYING_LATER = "read line; echo 1; read line; echo No memory >&2"
ANSWERING = """while read line; do case "$line" in
SCORE*) echo 1 ;;
EVAL*) echo 0.25; echo 0.5 ;;
esac; done"""


@pytest.mark.skipif(os.name == "nt", reason="programs are scripts of a shell")
@pytest.mark.parametrize(("program", "told"), [(DYING, "Killed"), (DYING_LATER, "No memory")])
def test_meteor_is_missing_where_java_dies_and_the_next_call_works(
    program, told, tmp_path, monkeypatch
):
    """pycocoevalcap keeps its lock then, for which the next call and its destructor wait."""
    java = tmp_path / "java"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    metrics._meteor.cache_clear()
    for script in (program, program, ANSWERING):
        java.write_text(f"#!/bin/sh\n{script}\n")
        java.chmod(0o755)
        scores = metrics.triples(["a b"], [["a c"]])
        if script is ANSWERING:
            assert scores["METEOR"] == 0.5
        else:
            assert scores["METEOR"] == Missing(f"OSError: METEOR's Java program ended: {told}")
    metrics._meteor.cache_clear()


# ---- TER ----


def test_ter_of_the_paper_that_defines_it():
    """Snover et al. 2006, section 3: a shift, two substitutions, an insertion; 13 words."""
    reference = "saudi arabia denied this week information published in the american new york times"
    hypothesis = "this week the saudis denied information published in the new york times"
    assert metrics.ter([hypothesis], [[reference]]) == close(4 / 13)


def test_ter_is_the_mean_of_the_best_reference():
    # 1 of 4 words, against 4 of 4; then none.
    assert metrics.ter(["a b c x", "q"], [["v w y z", "a b c d"], ["q"]]) == close(1 / 8)


def test_missing_references_are_blank_lines_that_rate_1(without_java):
    long, short = "a b c d e f", "x y"  # 6 edits for 2 words: a rate of 3
    assert metrics.ter([long], [[short]]) == close(3)
    assert metrics.triples([long], [[short]])["TER"] == close(1)
    assert metrics.triples([long], [[short] * 5])["TER"] == close(1)
    assert metrics.triples([long], [[short] * 6])["TER"] == close(3)


def test_bleu_and_ter_are_those_of_the_webnlg_script(without_java):
    scores = metrics.triples(TRIPLES, TRIPLE_REFERENCES)
    assert round(scores["BLEU"], 2) == 19.56  # the script prints two digits
    assert scores["TER"] == close((0.25 + 0.9230769230769231) / 2)


def test_six_references_count(without_java):
    """As in the original, whose preparation writes six files of references."""
    references = [["x y z w v u"] * 6 + ["a b c d e f"]]
    assert metrics.triples(["a b c d e f"], references)["BLEU"] == 0
    assert metrics.triples(["a b c d e f"], [references[0][1:]])["BLEU"] == close(100)


# ---- parts ----


def test_score_tells_seen_from_unseen_categories(without_java):
    groups = [
        Group("1", ("a b c d",), "City"),
        Group("2", ("a b c d",), "Politician"),
        Group("3", ("a b c d",), "CelestialBody"),
    ]
    predictions = ["a b c d", "v w x y", "a b c d"]
    scores = metrics.score("webnlg", groups, predictions)
    assert {part: values["TER"] for part, values in scores.items()} == {
        "unseen": 0.5, "seen": 0.0, "all": close(1 / 3),
    }  # fmt: skip
    assert list(metrics.score("webnlg", groups[:1], predictions[:1])) == ["seen", "all"]
    assert list(metrics.score("dart", groups, predictions)) == ["all"]
    assert set(metrics.score("e2e", groups, predictions)["all"]) == {
        "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr",
    }  # fmt: skip
