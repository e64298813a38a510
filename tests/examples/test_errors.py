"""How the examples end if the user stops them."""

import importlib
import os
import runpy
import signal
import sys
import time

import pytest

from examples import errors, runs
from examples.errors import INTERRUPTED, TERMINATED, until_interrupted


def stopped():
    raise KeyboardInterrupt


def test_an_interrupt_is_one_line_and_130(capsys):
    assert until_interrupted(stopped, "go on") == INTERRUPTED == 130
    assert capsys.readouterr().err == "\ninterrupted: go on\n"


def test_sigterm_is_the_same_line_and_143_and_the_results_are_written(tmp_path, capsys):
    def main():
        with runs.reported(tmp_path / "results.json", {"lr": 1}) as results:
            results["step"] = 3
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    assert until_interrupted(main, "go on") == TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "\ninterrupted: go on\n"
    found = runs.read_json(tmp_path / "results.json")
    assert found == {"lr": 1, "step": 3, "status": "interrupted"}


def test_a_second_sigterm_does_not_break_off_what_is_written():
    written = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            written.append("results")

    assert until_interrupted(main, "go on") == TERMINATED
    assert written == ["results"]


def test_other_ends_are_the_programs_own():
    assert until_interrupted(lambda: 3, "") == 3
    with pytest.raises(ValueError, match="its own"):
        until_interrupted(lambda: int("its own"), "")


def test_the_other_processes_of_a_launcher_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert until_interrupted(stopped, "go on") == INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("finetune", ["--data", "a b"], "python -m examples.finetune --data 'a b' --resume"),
        ("nlu", ["--resume", "--task", "x"], "python -m examples.nlu --task x --resume"),
        ("nlg", ["train", "--lr", "1"], "python -m examples.nlg train --lr 1 --resume"),
        ("nlg", ["decode"], "start it again"),
    ],
)
def test_every_example_ends_with_the_command_that_goes_on(
    name, arguments, expected, monkeypatch, capsys
):
    module = importlib.import_module(f"examples.{name}.__main__")
    assert module.until_interrupted is errors.until_interrupted
    monkeypatch.setattr(errors, "until_interrupted", lambda main, what: print(what) or 130)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, f"examples.{name}.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=False)
    assert ended.value.code == 130
    assert capsys.readouterr().out.endswith(f"{expected}\n")
