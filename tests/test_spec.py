"""OutputSplits, Needs, LoraSpec: the values that travel together."""

import numpy as np
import pytest
import torch

from lora_kernels.spec import LoraSpec, Needs, OutputSplits

UNEQUAL = OutputSplits((4, 3, 2), (True, False, True))


def test_output_splits_groups_are_columns_rows_and_ranks():
    assert list(UNEQUAL.groups(5)) == [
        (slice(0, 4), slice(0, 4), slice(0, 5)),
        (slice(7, 9), slice(4, 6), slice(5, 10)),
    ]


def test_output_splits_know_their_sums():
    assert (UNEQUAL.columns, UNEQUAL.rows, UNEQUAL.count) == (9, 6, 2)
    assert OutputSplits.whole(7) == OutputSplits((7,), (True,))


@pytest.mark.parametrize(
    ("enabled", "sizes", "expected"),
    [
        ([True, False], None, ((6, 6), (True, False))),
        ((True, False), [11, 1], ((11, 1), (True, False))),
        ([False], None, ((12,), (False,))),
        ([True, False], list(np.array([11, 1])), ((11, 1), (True, False))),
    ],
)
def test_output_splits_of_what_fits(enabled, sizes, expected):
    splits = OutputSplits.of(12, enabled, sizes, owner="layer")
    assert (splits.sizes, splits.enabled) == expected
    assert hash(splits) == hash(OutputSplits(*expected))


@pytest.mark.parametrize(
    ("enabled", "sizes", "match"),
    [
        ([], None, "flags must be a list of at least one bool, got \\[\\]"),
        ("yes", None, "flags .*'yes'"),
        (None, None, "flags .*None"),
        ([1, 0], None, "flags .*1, 0"),
        ([True] * 5, None, "length of flags must divide the 12 .*give parts"),
        (
            [True, True],
            [12],
            "parts must be a list of 2 integers >= 1.*12 output .*got \\[12\\]",
        ),
        ([True, True], [11, 2], "parts .*11, 2"),
        ([True, True], [12, 0], "parts .*12, 0"),
        ([True, True], [6.0, 6.0], "parts .*6.0"),
        ([True, True], ["6", "6"], "parts .*'6'"),
        ([True, True], [True, 11], "parts .*True"),
        ([True, True], "66", "parts .*'66'"),
        ([True, True], {6: 6}, "parts "),
    ],
)
def test_output_splits_of_what_does_not_fit_name_it(enabled, sizes, match):
    with pytest.raises(ValueError, match=f"^layer: (the )?{match}"):
        OutputSplits.of(12, enabled, sizes, owner="layer", names=("flags", "parts"))


def test_needs_spread_puts_gradients_where_they_are_needed():
    grads = torch.zeros(1), torch.ones(1)
    assert Needs(x=True, b=True).spread(grads) == (grads[0], None, None, grads[1], None)
    assert Needs().spread(()) == (None,) * 5


def test_lora_spec_is_a_value():
    specs = {
        LoraSpec(2.0, 0.1, UNEQUAL),
        LoraSpec(2.0, 0.1, OutputSplits((4, 3, 2), UNEQUAL.enabled)),
    }
    assert len(specs) == 1
    with pytest.raises(AttributeError):
        next(iter(specs)).scaling = 1.0
