"""The example under torchrun: two processes train as one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.finetune import ranks
from examples.finetune.__main__ import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model_without_dropout(tiny_model, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_probs_dropout_prob": 0.0}))
    return path


def test_two_processes_have_the_losses_of_one(model_without_dropout, tiny_data, tmp_path):
    """71 sentences: of seven the ranks have four and three, and of the last one one has none."""
    arguments = [
        "--model", str(model_without_dropout), "--data", tiny_data, "--train", "71", "--dropout",
        "0", "--batch-size", "7", "--epochs", "2", "--device", "cpu", "--output",
    ]  # fmt: skip
    assert main([*arguments, str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "examples.finetune", *arguments, tmp_path / "two",
        ],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len(one["losses"]) == len(two["losses"]) == 22
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert two["tokens"] == one["tokens"]
    assert done.stdout.count("reloaded         ok") == 1  # the first rank alone reports
    assert "ranks            2\n" in done.stdout


@pytest.mark.parametrize(("rows", "count"), [(7, 2), (1, 2), (5, 3), (6, 1)])
def test_shares_are_the_batch_and_their_weights_make_its_mean(rows, count, monkeypatch):
    batch = [row * row + 1.0 for row in range(rows)]
    monkeypatch.setattr(ranks, "count", lambda: count)
    taken, mean = [], 0.0
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        share, weight = ranks.share(batch)
        assert share
        taken += share if weight else []
        mean += weight * sum(share) / len(share) / count
    assert sorted(taken) == batch
    assert mean == pytest.approx(sum(batch) / rows)
