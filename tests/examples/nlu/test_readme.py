"""The README's commands exist, and its figures are those of settings.tsv."""

import re
from pathlib import Path

from examples import nlu
from examples.nlu import compare
from examples.nlu.__main__ import _parser
from examples.nlu.tasks import TASKS, settings

README = Path(nlu.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_every_flag_in_a_command_exists():
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S))
    flags = set(re.findall(r"(?<!\S)--[a-z-]+", commands))
    known = {*_parser()._option_string_actions, *compare._parser()._option_string_actions}
    assert {"--task", "--start-from", "--adapter"} <= flags <= known


def test_the_released_adapters_are_given_their_alpha():
    (command,) = re.findall(r"^python -m examples.nlu (?:.*\\\n)*.*\.bin.*$", README, re.M)
    name = re.search(r"--settings (\S+)", command)[1]
    assert settings(name, "mnli").alpha == 16


def test_the_learning_rates_of_the_table_are_those_of_the_comparison():
    for method, title in compare.METHODS.items():
        (row,) = re.findall(rf"^\| {re.escape(title)} \|.*$", README, re.M)
        assert float(row.split("|")[4]) == compare.RATES[method] in compare.GRID[method]
    # What the README says was not tried.
    assert "also 5e-5 for full fine-tuning, and three rates for the head" in README
    assert set(compare.GRID["full"]) == {5e-5, 1e-4, 2e-4}
    assert len(compare.GRID["head"]) == 3


def test_the_loops_run_every_task():
    loops = re.findall(r"for task in (.*); do", README)
    assert sorted(" ".join(loops).split()) == sorted(TASKS)
