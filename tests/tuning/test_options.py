"""Lists on the command line."""

import argparse

import pytest

from lora_kernels.tuning.options import count, duration, listed, probability


def test_listed_takes_values_between_commas():
    assert listed(int)("1, 2,3") == [1, 2, 3]
    assert listed(str, ("a", "b"))("b,a") == ["b", "a"]
    assert listed(count)("1,16") == [1, 16]
    assert listed(probability)("0,0.5") == [0.0, 0.5]
    assert duration("0.5") == 0.5


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (listed(int), "8,many", "int() with base 10: 'many'"),
        (listed(count), "8,0", "must be an integer >= 1, got '0'"),
        (listed(count), "8,", "must be an integer >= 1, got ''"),
        (listed(probability), "0,1.0", "must be in [0, 1), got '1.0'"),
        (duration, "nan", "must be a number > 0, got 'nan'"),
        (duration, "-1", "must be a number > 0, got '-1'"),
        (duration, "0", "must be a number > 0, got '0'"),
        (listed(str, ("a", "b")), "a,c", "'c' is not one of a, b"),
    ],
)
def test_listed_names_a_value_that_it_does_not_take(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        parse(text)
    assert message in str(raised.value)
