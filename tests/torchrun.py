"""Two processes under torchrun, and the environment that it gives to one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["environment", "run"]

REPOSITORY = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Of the only rank, with a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def run(*command: str | Path, **variables: str) -> str:
    """What ``torchrun --nproc-per-node 2 -m command`` prints; it has to end well."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", *command,
        ],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout
