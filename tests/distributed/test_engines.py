"""Two processes under ``torchrun -m lora_kernels run``: DDP and FSDP2, one test for each check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.worker import CHECKS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each check."""
    results = tmp_path_factory.mktemp("distributed") / "results.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "lora_kernels", "run", "-m", "tests.distributed.worker", results,
        ],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_two_processes(found, name):
    for rank, outcome in enumerate(found[name]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
