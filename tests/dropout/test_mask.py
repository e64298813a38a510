"""The definition of the mask: published Philox vectors, and the layout of counters and draws."""

import pytest
import torch

from lora_kernels import dropout
from tests.dropout.scalar import keep, philox

# Random123's kat_vectors: rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(rounds, counter, key, expected):
    assert philox(words(counter), words(key), rounds) == words(expected)


@pytest.mark.parametrize("value", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("first_row", [0, 2**31 - 2, 2**32 - 2, 2**40 + 5, 2**62])
def test_keep_is_philox_with_the_documented_counter(value, first_row, device):
    seed = torch.tensor([value], device=device)
    row, col = first_row + torch.arange(4, device=device), torch.arange(19, device=device)
    expected = [[keep(value, first_row + i, j, 0.4) for j in range(19)] for i in range(4)]
    assert dropout.keep(seed, row[:, None], col, 0.4).tolist() == expected


@pytest.mark.parametrize("p", [0.0, 1e-9, 2**-16, 0.1, 0.5, 0.9, 1 - 2**-16, 1 - 1e-9])
def test_threshold_rounds_p_to_sixteen_bits_and_never_drops_everything(p):
    kept = 32768 - dropout.threshold(p)
    assert 1 <= kept <= 65536
    assert abs(kept / 65536 - (1 - p)) <= 2**-16
    assert dropout.keep_scale(p) * kept == 65536
