"""How the examples end if the user stops them."""

import importlib
import runpy
import sys

import pytest

from examples import errors
from examples.errors import INTERRUPTED, until_interrupted


def stopped():
    raise KeyboardInterrupt


def test_an_interrupt_is_one_line_and_130(capsys):
    assert until_interrupted(stopped, "go on") == INTERRUPTED == 130
    assert capsys.readouterr().err == "\ninterrupted: go on\n"


def test_other_ends_are_the_programs_own():
    assert until_interrupted(lambda: 3, "") == 3
    with pytest.raises(ValueError, match="its own"):
        until_interrupted(lambda: int("its own"), "")


@pytest.mark.parametrize("name", ["finetune", "nlu", "nlg"])
def test_every_example_ends_so(name, monkeypatch, capsys):
    module = importlib.import_module(f"examples.{name}.__main__")
    assert module.until_interrupted is errors.until_interrupted
    monkeypatch.setattr(errors, "until_interrupted", lambda main, what: print(what) or 130)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.delitem(sys.modules, f"examples.{name}.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=False)
    assert ended.value.code == 130
    said = capsys.readouterr().out
    assert ("--resume" in said) == (name != "finetune")
