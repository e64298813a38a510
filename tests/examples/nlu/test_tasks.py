"""The table of hyperparameters, against the paper's tables 9 and 10 and loralib's scripts."""

import pytest

from examples.errors import InputError
from examples.nlu.tasks import TASKS, Settings, settings

MODELS = [
    "roberta-base", "roberta-large", "roberta-large-restricted", "deberta-v2-xxlarge",
    "roberta-base-scripts", "roberta-large-scripts", "deberta-v2-xxlarge-scripts",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_every_task(model):
    rows = {name: settings(model, name) for name in TASKS}
    assert all(isinstance(row, Settings) for row in rows.values())
    starts = {name for name, row in rows.items() if row.start == "mnli"}
    assert starts == (set() if model.endswith("restricted") else {"mrpc", "rte", "stsb"})


# Rows as the paper prints them, in the order MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B.
@pytest.mark.parametrize(
    ("model", "column", "values"),
    [
        ("roberta-base", "batch_size", [16, 16, 16, 32, 32, 16, 32, 16]),
        ("roberta-base", "epochs", [30, 60, 30, 80, 25, 25, 80, 40]),
        ("roberta-base", "lr", [5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4]),
        ("roberta-base", "alpha", [8] * 8),
        ("roberta-base", "max_length", [512] * 8),
        ("roberta-base", "warmup", [0.06] * 8),
        ("roberta-large", "batch_size", [4, 4, 4, 4, 4, 4, 8, 8]),
        ("roberta-large", "epochs", [10, 10, 20, 20, 10, 20, 20, 30]),
        ("roberta-large", "lr", [3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4]),
        ("roberta-large", "alpha", [16] * 8),
        ("roberta-large", "max_length", [128, 128, 512, 128, 512, 512, 512, 512]),
        ("roberta-large-restricted", "batch_size", [4] * 8),
        ("roberta-large-restricted", "epochs", [10, 10, 20, 20, 10, 20, 20, 10]),
        ("roberta-large-restricted", "max_length", [128] * 8),
        ("deberta-v2-xxlarge", "batch_size", [8, 8, 32, 4, 6, 8, 4, 4]),
        ("deberta-v2-xxlarge", "epochs", [5, 16, 30, 10, 8, 11, 11, 10]),
        ("deberta-v2-xxlarge", "lr", [1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4]),
        ("deberta-v2-xxlarge", "weight_decay", [0, 0.01, 0.01, 0, 0.01, 0.01, 0.01, 0.1]),
        ("deberta-v2-xxlarge", "cls_dropout", [0.15, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2]),
        ("deberta-v2-xxlarge", "max_length", [256, 128, 128, 64, 512, 320, 320, 128]),
        ("deberta-v2-xxlarge", "alpha", [8] * 8),
        ("deberta-v2-xxlarge", "warmup", [0.1] * 8),
        ("roberta-base-scripts", "alpha", [16] * 8),
        ("deberta-v2-xxlarge-scripts", "rank", [16] * 8),
        ("deberta-v2-xxlarge-scripts", "alpha", [32] * 8),
        ("deberta-v2-xxlarge-scripts", "warmup", [1000, 1000, 0.1, 100, 500, 10000, 50, 100]),
    ],
)
def test_the_table_is_the_papers(model, column, values):
    assert [getattr(settings(model, name), column) for name in TASKS] == values


def test_the_rank_is_8_in_the_paper():
    assert {settings(model, name).rank for model in MODELS[:6] for name in TASKS} == {8}


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(InputError, match="roberta-base, roberta-large") as error:
        settings("bert", "sst2")
    assert "'bert'" in str(error.value)
