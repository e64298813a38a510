"""pytest bench/: what it refuses, in one line and before it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(
            "--bench-device=cuda",
            "--bench-device cuda: PyTorch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("--bench-seconds=-1", "--bench-seconds must not be negative, got -1.0"),
        ("--ranks=0", "argument --ranks: must be an integer >= 1, got '0'"),
        ("--dropout=1", "argument --dropout: must be in [0, 1), got '1'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(option, message):
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", option]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
