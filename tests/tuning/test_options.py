"""Lists on the command line."""

import argparse

import pytest

from lora_kernels.tuning.options import listed


def test_listed_takes_values_between_commas():
    assert listed(int)("1, 2,3") == [1, 2, 3]
    assert listed(str, ("a", "b"))("b,a") == ["b", "a"]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (listed(int), "8,many", "int() with base 10: 'many'"),
        (listed(str, ("a", "b")), "a,c", "'c' is not one of a, b"),
    ],
)
def test_listed_names_a_value_that_it_does_not_take(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        parse(text)
    assert message in str(raised.value)
