"""Records of calls, in a process that does not interpret kernels, over the stand-in driver."""

import json
import os
import subprocess
import sys

import pytest

from bench import standin
from tests.kernels.recorded import CHECKS

ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}


@pytest.fixture(scope="module")
def found():
    """What went wrong, by check."""
    if reason := standin.why_not():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.recorded"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_over_the_stand_in_driver(found, name):
    assert found[name] is None, found[name]
