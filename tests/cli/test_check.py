"""lora-kernels check: exit codes, the table and JSON."""

import json

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.kernels import shrink
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.tuning import check as checks
from lora_kernels.tuning import workers

ARGUMENTS = ["check", "--kernels=shrink", "--jobs=1"]


@pytest.fixture(autouse=True)
def few(monkeypatch, cache):
    everything = checks.variants
    monkeypatch.setattr(checks, "variants", lambda only: everything(only)[:3])


def wrong(function, grid, **arguments):
    launch(function, grid, **arguments)
    arguments["h_ptr"].mul_(2)


def test_right_kernels_are_a_table_and_0(capsys):
    assert main(ARGUMENTS) == 0
    title, head, row = capsys.readouterr().out.splitlines()
    assert "each kernel twice, against float64" in title
    assert f"torch {torch.__version__}" in title
    assert head.startswith("right of")
    assert row.split() == ["shrink"] + ["1", "of", "1"] * 3


def test_a_wrong_kernel_is_named_and_1(capsys, monkeypatch):
    monkeypatch.setattr(shrink, "launch", wrong)
    assert main(ARGUMENTS) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["shrink"] + ["0", "of", "1"] * 3
    assert lines[3].startswith("shrink bfloat16 r=16 dropout: WrongKernelError: wrong: ")
    assert len(lines) == 7
    assert lines[-1] == "of 3, 3 are wrong, 0 were not reached in time"


def test_json_has_every_variant(capsys, monkeypatch):
    monkeypatch.setattr(shrink, "launch", wrong)
    assert main([*ARGUMENTS, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["torch"] == torch.__version__
    assert [each["dtype"] for each in found["checked"]] == ["bfloat16", "float16", "float32"]
    assert all(each["reason"].startswith("WrongKernelError") for each in found["checked"])
    assert found["checked"][0].keys() == {
        "launcher", "dtype", "lora_dtype", "r", "dropout", "small_m", "aligned", "transposed",
        "narrow", "enabled", "reason",
    }  # fmt: skip


def test_a_gpu_that_does_not_answer_is_one_line(capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with ...")

    monkeypatch.setattr(checks.selfcheck, "key_of", fails)
    assert main(ARGUMENTS) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "check: the GPU cannot be used (CUDA error: all CUDA-capable" in err


@pytest.mark.parametrize(
    ("first", "code", "cell", "counts"),
    [
        (None, 3, ["1", "of", "1"], "of 3, 0 are wrong, 2 were not reached in time"),
        ("WrongKernelError", 1, ["0", "of", "1"], "of 3, 1 are wrong, 2 were not reached in time"),
    ],
)
def test_what_is_not_reached_is_told_from_what_is_wrong(
    capsys, monkeypatch, first, code, cell, counts
):
    reasons = [first, workers.NOT_REACHED, workers.NOT_REACHED]
    monkeypatch.setattr(workers, "attempt", lambda *_, **__: reasons)
    assert main(ARGUMENTS) == code
    _, head, row, *_, last = capsys.readouterr().out.splitlines()
    assert head.startswith("right of reached")
    assert row.split() == ["shrink", *cell, "-", "-"]
    assert last == f"{counts}: give more --seconds"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_is_refused(capsys, seconds):
    with pytest.raises(SystemExit) as raised:
        main([*ARGUMENTS, f"--seconds={seconds}"])
    assert raised.value.code == 2
    assert f"--seconds: must be a number > 0, got '{seconds}'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_2(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(ARGUMENTS) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "lora-kernels: error: check: there is no GPU; without one the kernels run under "
        "TRITON_INTERPRET=1 only\n"
    )


def test_another_kernel_is_named(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["check", "--kernels=shrink,grow"])
    assert raised.value.code == 2
    assert f"'grow' is not one of {', '.join(LAUNCHERS)}, fused, addmm" in capsys.readouterr().err
