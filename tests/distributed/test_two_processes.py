"""DDP and FSDP2 on two gloo processes: each test reads one result of the one run of worker.py."""

import json

import pytest
import torch

from lora_kernels import functional
from tests.distributed import worker


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str | None]]:
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker.run, (str(directory),), nprocs=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", worker.CHECKS)
def test_two_processes(results, name):
    for rank, result in enumerate(results):
        assert result[name] is None, f"rank {rank}: {result[name]}"


def test_seeds_of_a_single_process_are_the_generators(seed):
    generator = torch.get_rng_state()
    expected = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64)
    torch.set_rng_state(generator)
    assert torch.equal(functional._draw_seeds(torch.device("cpu"), 3), expected)
