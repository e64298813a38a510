"""Where the real data lies, SST-2 in miniature, a tiny RoBERTa, and runs of the program."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from examples.nlu.__main__ import main
from tests.examples.tiny import SUBJECTS, WORDS

REPOSITORY = Path(__file__).parents[3]
SHARED_DATA = Path(os.environ.get("LORA_KERNELS_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread():
    """Models of this size are no faster on several, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sst2(tiny_data) -> str:
    """Path of SST-2's training sentences, or of a small file in their layout."""
    real = SHARED_DATA / "sst2" / "train.tsv"
    return str(real) if real.is_file() else tiny_data


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A folder in the layout of MNLI: does one sentence follow from the other, and three sets."""
    folder = tmp_path_factory.mktemp("mnli")
    good, bad = WORDS[1], WORDS[0]
    rows = []
    for i, subject in enumerate(SUBJECTS):
        for j in range(4):
            premise = f"the {subject} was {good[j]}"
            rows += [
                ("entailment", premise, f"the {subject} was {good[j]} ."),
                ("neutral", premise, f"the {SUBJECTS[i - 1]} was very {good[j - 1]}"),
                ("contradiction", premise, f"the {subject} was {bad[j]}"),
            ]
    for name, part in (
        ("train", rows[:72]), ("dev_matched", rows[72:81]), ("dev_mismatched", rows[81:])
    ):  # fmt: skip
        lines = ["index\tsentence1\tsentence2\tlabel1\tgold_label"]
        lines += [f"{i}\t{a}\t{b}\t-\t{y}" for i, (y, a, b) in enumerate(part)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_roberta():
    """A RoBERTa of twelve layers, as roberta-base has them, eight wide; labels -> model."""

    def build(labels: int):
        torch.manual_seed(0)
        config = transformers.RobertaConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=12, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=9, num_labels=labels,
        )  # fmt: skip
        return transformers.RobertaForSequenceClassification(config)

    return build


@pytest.fixture
def nlu(tiny_model, tiny_data, tmp_path):
    """Runs the program on the tiny BERT; what results.json holds."""

    def run(*extra, name="run", **changes) -> dict:
        output = tmp_path / name
        options = {
            "task": "sst2", "model": tiny_model, "data": tiny_data, "settings": "roberta-base",
            "lr": "1e-2", "epochs": "3", "rank": "4", "max_length": "32", "output": str(output),
            **changes,
        }  # fmt: skip
        flags = [
            part
            for key, value in options.items()
            if value is not None
            for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        assert main([*flags, *extra]) == 0
        file = "evaluated.json" if "--evaluate-only" in extra else "results.json"
        return json.loads((output / file).read_text(encoding="utf-8"))

    return run
