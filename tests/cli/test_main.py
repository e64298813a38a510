"""The command line as a whole: version, help, exit codes, and what was meant instead."""

import os
import subprocess
import sys

import pytest
import torch

import lora_kernels
from lora_kernels import cli
from lora_kernels.cli import main


def ended(*arguments) -> int:
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return exit.code


def test_version(capsys):
    assert ended("--version") == 0
    expected = f"lora_kernels {lora_kernels.__version__}, torch {torch.__version__}\n"
    assert capsys.readouterr().out == expected


def test_without_a_command_it_is_the_help_and_2(capsys):
    assert ended() == 2
    out = capsys.readouterr().out
    for command in ("run", "doctor", "convert"):
        assert f"\n    {command} " in out


@pytest.mark.parametrize("arguments", [("walk",), ("convert",), ("doctor", "--jsn")])
def test_wrong_arguments_are_one_line_and_2(arguments, capsys):
    assert ended(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert ended("doctor") == 130
    assert capsys.readouterr().err == "lora-kernels: interrupted\n"


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("--help", ""), ("inspect", ""), ("inspect", "1")]
)
def test_a_reader_that_has_ended_is_no_traceback(command, unbuffered, tmp_path):
    arguments = [command]
    if command == "inspect":
        model = torch.nn.Sequential(lora_kernels.LoRALinear(4, 4, r=2))
        lora_kernels.save_adapter(model, tmp_path)
        arguments.append(str(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "lora_kernels", *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.stderr == ""
    assert done.returncode == 141


def test_names_that_stdout_cannot_encode_are_escaped(tmp_path):
    model = torch.nn.Sequential(lora_kernels.LoRALinear(4, 4, r=2))
    lora_kernels.save_adapter(model, tmp_path / "é")
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "inspect", str(tmp_path / "é")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\xe9: peft" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["python", "train.py", "--x"], "did you mean lora-kernels run train.py --x?"),
        (["python3.11", "train.py"], "did you mean lora-kernels run train.py?"),
        (
            ["accelerate", "launch", "train.py"],
            "did you mean accelerate launch -m lora_kernels run train.py?",
        ),
        (
            ["torchrun", "--nproc-per-node", "2"],
            "did you mean torchrun -m lora_kernels run SCRIPT?",
        ),
        (["timeit", "pass"], "did you mean lora-kernels run -m timeit pass?"),
        (["nothing.py"], "No such file or directory"),
    ],
)
def test_run_of_what_is_no_script_says_what_was_meant(
    arguments, meant, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert ended("run", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lora-kernels: error: run: cannot open {arguments[0]}: ")
    assert err.endswith(f"{meant}\n")
    assert err.count("\n") == 1


def test_run_passes_its_flags_on(monkeypatch):
    from lora_kernels.cli import run

    seen = []
    monkeypatch.delenv("LORA_KERNELS_REPORT", raising=False)
    monkeypatch.setenv("LORA_KERNELS_QUIET", "")
    monkeypatch.setattr(run, "run_script", lambda target, its: seen.append((target, its)) or 0)
    assert ended("run", "--report", "--quiet", "train.py", "--quiet") == 0
    assert seen == [("train.py", ["--quiet"])]
    assert (os.environ["LORA_KERNELS_REPORT"], os.environ["LORA_KERNELS_QUIET"]) == ("1", "1")
    monkeypatch.delenv("LORA_KERNELS_REPORT")
