"""The command: what it refuses, what it writes and what it prints."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.kernels.config import GemmConfig, SkinnyConfig
from lora_kernels.tuning import tune

REPOSITORY = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_main_asks_for_the_interpreter_without_a_gpu(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kernels=shrink,grow", "'grow' is not one of shrink, "),
        ("--tokens=8,many", "must be an integer >= 1, got 'many'"),
    ],
)
def test_main_refuses_lists_of_what_there_is_not(option, message, capsys):
    with pytest.raises(SystemExit):
        tune.main([option])
    assert message in capsys.readouterr().err


def test_main_refuses_shapes_that_no_launcher_takes(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--kernels=gemm_small_m", "--tokens=65", "--jobs=1"])
    assert "gemm_small_m take none of these shapes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tune") / "folder" / "rows.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "lora_kernels.tuning.tune", "--kernels=expand_dx,gemm_bwd",
            "--tokens=8", "--ranks=2", "--limit=2", "--jobs=2", f"--output={path}",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


def test_main_writes_what_was_tried_where_and_how_fast(run):
    _, rows = run
    screened = [row for row in rows if row["stage"] == "screen"]
    assert [row["kernel"] for row in screened] == ["expand_dx"] * 3 + ["gemm_bwd"] * 3
    assert [row["is_table"] for row in screened] == [True, False, False] * 2
    for row in rows:
        assert row.keys() == {
            "commit", "python", "torch", "triton", "threads", "gpu", "capability", "driver",
            "kernel", "table", "entry", "m", "k", "n", "r", "dropout_p", "dtype", "factors",
            "device", "stage", "config", "is_table", "rounds", "p10_ms", "median_ms", "p90_ms",
            "over_table", "gb_s", "tflop_s", "reason",
        }  # fmt: skip
        assert (row["torch"], row["device"], row["reason"]) == (torch.__version__, "cpu", None)
        assert (row["m"], row["r"], row["dropout_p"]) == (8, 2, 0.1)
        assert (row["n"] is None) == (row["kernel"] == "expand_dx")
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["over_table"][1] <= row["over_table"][0] <= row["over_table"][2]
        fields = dict(row["config"])
        kind = {kind.__name__: kind for kind in (SkinnyConfig, GemmConfig)}[fields.pop("type")]
        assert kind is (SkinnyConfig if row["table"] == "expand" else GemmConfig)
        assert row["entry"] == "any product"
        assert fields == dataclasses.asdict(kind(**fields))


def test_main_names_every_case_and_ends_with_a_verdict_on_each_table(run):
    output, _ = run
    assert "6 launches in 2 processes\n0 fail" in output
    expand, gemm_bwd = (f"{name}.py interpreter (any product): " for name in ("expand", "gemm_bwd"))
    assert f"expand_dx m8 k48 r2 p0.1 float32, {expand}3 of 3 timed" in output
    assert f"gemm_bwd m8 k48 n40 r2 p0.1 float32, {gemm_bwd}3 of 3 timed" in output
    _, verdicts = output.split("tables that are beaten: ")
    assert expand in verdicts
    assert gemm_bwd in verdicts
