"""GLUE's metrics, by scikit-learn and scipy, and the figures that the paper reports."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from examples.nlu.tasks import TASKS, Task

__all__ = ["average", "paper_score", "score"]


def _correlation(measure):
    """measure(labels, predictions); 0 where one side is constant, which leaves it undefined.

    scikit-learn defines Matthews' correlation so.
    """

    def correlation(labels, predictions) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return measure(labels, predictions).statistic

    return correlation


METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,  # of class 1: equivalent, duplicate
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every metric of task, and "combined", their mean.

    Shapes: logits [examples, classes], or [examples, 1] for a number; labels [examples].
    """
    predictions = logits.argmax(1) if task.labels else logits[:, 0]
    scores = {name: float(METRICS[name](labels, predictions)) for name in task.metrics}
    return {**scores, "combined": sum(scores.values()) / len(scores)}


def paper_score(task: Task, dev: Mapping[str, Mapping[str, float]]) -> float:
    """The figure of the paper's table 2: task's first metric over all examples of its sets.

    That is MNLI's accuracy over matched and mismatched together. dev: name of the set -> its
    metrics, and the number of its "examples".
    """
    sets = [dev[name] for name in task.dev]
    total = sum(one["examples"] for one in sets)
    return sum(one[task.metrics[0]] * one["examples"] for one in sets) / total


def average(scores: Mapping[str, Sequence[float]]) -> float | None:
    """GLUE's combined score: the mean over the eight tasks of the median over the runs of each.

    None where a task is missing. The paper takes the median of five seeds.
    """
    if any(not scores.get(name) for name in TASKS):
        return None
    return float(np.mean([np.median(scores[name]) for name in TASKS]))
