"""GLUE's metrics on cases worked out by hand."""

import math

import numpy as np
import pytest

from examples.nlu import metrics
from examples.nlu.tasks import TASKS


def logits(predictions, classes=2):
    """Rows whose largest entry is that of the predicted class."""
    return np.eye(classes)[predictions]


def test_accuracy_of_three_classes():
    scores = metrics.score(TASKS["mnli"], logits([0, 1, 2, 2], 3), np.array([0, 1, 1, 2]))
    assert scores == {"accuracy": 0.75, "combined": 0.75}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1_of_the_positive_class_and_their_mean(task):
    # 2 of 3 found, 2 of 4 right: precision 1/2, recall 2/3, F1 4/7; accuracy 3/6.
    scores = metrics.score(
        TASKS[task], logits([1, 1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1, 0])
    )  # fmt: skip
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == pytest.approx(4 / 7, rel=1e-15)
    assert scores["combined"] == pytest.approx((0.5 + 4 / 7) / 2, rel=1e-15)


def test_matthews_correlation():
    # TP 2, FP 1, FN 1, TN 2: (2·2 - 1·1) / sqrt(3·3·3·3).
    scores = metrics.score(
        TASKS["cola"], logits([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    )  # fmt: skip
    assert scores["matthews"] == pytest.approx(1 / 3, rel=1e-15)


def test_pearson_and_spearman():
    # Deviations (-1.5, -.5, .5, 1.5) and (-4, -2, 0, 6): 16 / sqrt(5 · 56). The ranks agree.
    scores = metrics.score(
        TASKS["stsb"], np.array([[0.0], [2.0], [4.0], [10.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    )  # fmt: skip
    pearson = 16 / math.sqrt(280)
    assert scores["pearson"] == pytest.approx(pearson, rel=1e-14)
    assert scores["spearman"] == pytest.approx(1.0, rel=1e-14)
    assert scores["combined"] == pytest.approx((1 + pearson) / 2, rel=1e-14)


def test_constant_predictions_have_no_correlation():
    scores = metrics.score(TASKS["stsb"], np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert scores == {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
    assert metrics.score(TASKS["cola"], logits([1, 1]), np.array([0, 1]))["matthews"] == 0.0


def test_the_paper_counts_mnli_over_both_sets():
    sets = {
        "matched": {"accuracy": 0.9, "examples": 30},
        "mismatched": {"accuracy": 0.5, "examples": 10},
    }
    assert metrics.paper_score(TASKS["mnli"], sets) == pytest.approx(0.8, rel=1e-15)


def test_the_average_is_that_of_the_papers_table_2():
    # RoBERTa base, LoRA.
    row = dict(zip(TASKS, (87.5, 95.1, 89.7, 63.4, 93.3, 90.8, 86.6, 91.5), strict=True))
    scores = {name: [value - 3, value, value + 1] for name, value in row.items()}
    assert round(metrics.average(scores), 1) == 87.2
    assert metrics.average({**scores, "rte": []}) is None
