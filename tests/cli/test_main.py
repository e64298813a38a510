"""The command line as a whole: version, help, exit codes, and what was meant instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import cli
from lora_kernels.cli import main
from lora_kernels.cli.arguments import COMMANDS


def ended(*arguments) -> int:
    try:
        return main(list(arguments))
    except SystemExit as exit:
        return exit.code


def test_version(capsys):
    assert ended("--version") == 0
    expected = f"lora_kernels {lora_kernels.__version__}, torch {torch.__version__}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], ["walk"]] + [[name, "--help"] for name in COMMANDS]
)
def test_help_version_and_errors_do_not_import_pytorch(arguments):
    code = f"""
import sys
from lora_kernels.cli import main
try:
    main({arguments})
finally:
    print([name for name in ("torch", "safetensors", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_without_a_command_it_is_the_help_and_2(capsys):
    assert ended() == 2
    out = capsys.readouterr().out
    for command in ("run", "doctor", "convert"):
        assert f"\n    {command} " in out


@pytest.mark.parametrize(
    ("arguments", "help_of"),
    [
        (("walk",), ""),
        (("--vrsion", "doctor"), ""),
        (("convert",), " convert"),
        (("run", "--reprot", "train.py"), " run"),
        (("doctor", "--jsn"), " doctor"),
        (("report", "model", "--rnk", "3"), " report"),
        (("check", "shrink"), " check"),
        (("tune", "model", "--shpaes=4x4"), " tune"),
        (("convert", "a", "b", "--form", "peft"), " convert"),
        (("inspect", "a", "b"), " inspect"),
    ],
)
def test_wrong_arguments_are_one_line_and_2_and_name_the_help_of_the_command(
    arguments, help_of, capsys
):
    assert ended(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"lora-kernels{help_of}: error: ")
    assert err.endswith(f" (see lora-kernels{help_of} --help)\n")


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_kernels.cli.doctor.main", interrupted)
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


def completed(line, tmp_path):
    """What argcomplete's shell function gets for a command line, cursor at its end."""
    argcomplete = pytest.importorskip("argcomplete")
    assert argcomplete.__name__ == "argcomplete"
    answer = tmp_path / "answer"
    environment = {
        "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n",
    }  # fmt: skip
    code = "import sys; from lora_kernels.cli import main; sys.exit(main([]))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    return answer.read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("lora-kernels doc", ["doctor "]), ("lora-kernels convert a b --to gg", ["gguf "])],
)
def test_shells_complete_commands_and_values(line, expected, tmp_path):
    assert completed(line, tmp_path) == expected


def test_global_completion_finds_its_mark_in_the_module_of_the_entry_point():
    source = Path(cli.__file__).read_text(encoding="utf-8")
    assert "PYTHON_ARGCOMPLETE_OK" in source[:1024]
