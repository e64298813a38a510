"""The example's share of a batch and its process group; a run on two ranks: tests/distributed."""

import pytest
import torch
from torch import distributed

from examples.finetune import ranks
from tests import torchrun


def test_alone_there_is_one_rank_and_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with ranks.process_group(torch.device("cpu")):
        assert not distributed.is_initialized()
        assert (ranks.rank(), ranks.count(), ranks.local()) == (0, 1, 0)
    model = torch.nn.Linear(1, 1)
    assert ranks.parallel(model) is model


def test_what_torchrun_sets_makes_a_group_that_ends_with_the_run(monkeypatch):
    for name, value in torchrun.environment().items():
        monkeypatch.setenv(name, value)
    device = torch.device("cpu")
    with ranks.process_group(device):
        with ranks.process_group(device):
            pass
        assert distributed.is_initialized()
        assert (ranks.rank(), ranks.count()) == (0, 1)
    assert not distributed.is_initialized()


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
