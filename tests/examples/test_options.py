"""The command lines of the three programs are one dialect."""

import argparse

import pytest

from examples.finetune.__main__ import _parser as finetune
from examples.nlg.__main__ import _parser as nlg
from examples.nlu.__main__ import _parser as nlu
from examples.options import SHARED, add


def training(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of training, by flag."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices["train"]
    return dict(parser._option_string_actions)


PROGRAMS = {"finetune": training(finetune()), "nlu": training(nlu()), "nlg": training(nlg())}


def test_a_flag_of_two_programs_is_shared_or_means_the_data_of_a_program():
    flags = [flag for options in PROGRAMS.values() for flag in options if flag.startswith("--")]
    several = {flag for flag in flags if flags.count(flag) > 1}
    assert several - SHARED.keys() == {"--help", "--data", "--task"}


@pytest.mark.parametrize("flag", SHARED)
def test_what_is_shared_looks_the_same_everywhere(flag):
    actions = [options[flag] for options in PROGRAMS.values() if flag in options]
    assert len({action.metavar for action in actions}) == 1
    assert len({action.choices for action in actions}) == 1
    assert {action.dest for action in actions} == {flag[2:].replace("-", "_")}
    if flag in ("--device", "--seed", "--precision", "--accumulation", "--save-every", "--resume"):
        assert len({action.default for action in actions}) == 1
        assert len(actions) > 1


@pytest.mark.parametrize("flag", ["--output", "--device", "--seed", "--resume", "--rank"])
def test_every_program_has(flag):
    assert all(flag in options for options in PROGRAMS.values())


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("finetune", "on all ranks together: each of two ranks takes N / 2"),
        ("nlu", "on each device: two devices take 2 N at a time"),
        ("nlg", "on each device: two devices take 2 N at a time"),
    ],
)
def test_help_says_whose_batch_the_size_is(program, told):
    assert told in PROGRAMS[program]["--batch-size"].help


def test_help_is_that_of_all_programs_or_goes_on_from_it():
    parser = argparse.ArgumentParser()
    add(parser, "--seed", 3, ", and of more")
    add(parser, "--rank", None, "something else")
    one, two = (parser._option_string_actions[flag].help for flag in ("--seed", "--rank"))
    assert one == f"{SHARED['--seed']['help']}, and of more (default: 3)"
    assert two == "something else"
