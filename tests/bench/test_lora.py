"""``pytest bench/`` itself, on one small budget: what it measures, writes and prints."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lora_kernels.tuning import repository

# An unpacked archive has no commit to measure beside it.
VERSIONED = not repository.commit().startswith(repository.UNVERSIONED)
BASE = f"lora_kernels@{repository.git('rev-parse', '--short=10', 'HEAD')}" if VERSIONED else None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "bench", "-k=test_merged_linear",
            *(["--base=HEAD"] if VERSIONED else []), "--mode=forward", "--dropout=0",
            "--bench-seconds=0", "--bench-device=cpu",
            f"--bench-results={folder / 'rows.json'}",
            f"--benchmark-json={folder / 'benchmark.json'}", "-p", "no:cacheprovider",
        ],
        cwd=repository.REPOSITORY, capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "rows.json").read_text())
    record = json.loads((folder / "benchmark.json").read_text())
    return done.stdout, rows, record


def test_rows_say_what_was_measured_where_and_how_fast(run):
    _, rows, _ = run
    expected = ["frozen", "loralib", *([BASE] if VERSIONED else []), "lora_kernels"]
    assert [row["implementation"] for row in rows] == expected
    for row in rows:
        assert row["torch"] == torch.__version__
        assert (row["k"], row["n"], row["dtype"], row["mode"]) == (1024, 3072, "float32", "forward")
        assert row["commit"]
        assert row["gpu"] is row["capability"] is None
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]


def test_pytest_benchmark_holds_the_same_numbers(run):
    _, rows, record = run
    by_name = {entry["extra_info"]["implementation"]: entry for entry in record["benchmarks"]}
    assert by_name.keys() == {row["implementation"] for row in rows}
    for row in rows:
        entry = by_name[row["implementation"]]
        assert entry["extra_info"] == row
        assert entry["stats"]["rounds"] == row["rounds"]
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row["median_ms"])


def test_terminal_ends_with_the_table(run):
    output, rows, _ = run
    assert "\ncells: " in output
    for row in rows:
        assert f"{row['median_ms']:9.3f}" in output
