"""The README's commands exist, and its figures are those of settings.tsv."""

import re
from pathlib import Path

from examples import nlu
from examples.nlu import compare
from examples.nlu.__main__ import _parser
from examples.nlu.tasks import TASKS

README = Path(nlu.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_every_flag_in_a_command_exists():
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S))
    flags = set(re.findall(r"(?<!\S)--[a-z-]+", commands))
    known = {*_parser()._option_string_actions, *compare._parser()._option_string_actions}
    assert {"--task", "--start-from", "--adapter"} <= flags <= known


def test_the_loops_run_every_task():
    loops = re.findall(r"for task in (.*); do", README)
    assert sorted(" ".join(loops).split()) == sorted(TASKS)
