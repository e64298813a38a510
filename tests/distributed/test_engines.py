"""Two processes under ``torchrun -m lora_kernels run``: DDP and FSDP2, one test for each check."""

import json

import pytest

from tests import torchrun
from tests.distributed.worker import CHECKS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each check."""
    results = tmp_path_factory.mktemp("distributed") / "results.json"
    torchrun.run("lora_kernels", "run", "-m", "tests.distributed.worker", results)
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_two_processes(found, name):
    for rank, outcome in enumerate(found[name]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
