"""Masks that are kept: every bit of them, and no more than their bound."""

import pytest
import torch

from lora_kernels.dropout import drawn
from lora_kernels.dropout.drawn import Drawn


def flags_of(value: int, octets: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(value)
    return torch.randint(2, (8 * octets,), generator=generator, dtype=torch.uint8)


def test_every_byte_comes_back(seed):
    octets = torch.arange(256, dtype=torch.uint8)
    every = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # all octets of flags
    kept, flags = Drawn(), every.flatten()
    kept.keep("key", flags.clone())
    found = torch.full_like(flags, 7)
    assert kept.find("key", found)
    assert torch.equal(found, flags)
    assert not kept.find("another", found)
    assert torch.equal(found, flags)


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(drawn, "MOST_BYTES", 3 * 1030)  # three of them, with what an entry takes
    kept, found = Drawn(), torch.empty(24, dtype=torch.uint8)
    for value in range(5):
        kept.keep(value, flags_of(value))
    assert [kept.find(value, found) for value in range(5)] == [False, False, True, True, True]
    assert kept.find(4, found)
    assert torch.equal(found, flags_of(4))


@pytest.mark.parametrize("octets", [0, 3000])
def test_one_that_is_too_large_leaves_nothing(octets, monkeypatch):
    monkeypatch.setattr(drawn, "MOST_BYTES", 2000)
    kept, found = Drawn(), torch.empty(8 * octets, dtype=torch.uint8)
    kept.keep("first", flags_of(0, 1))
    kept.keep("second", flags_of(1, octets))
    assert kept.find("second", found) == (octets == 0)
    kept.keep("third", flags_of(2, 1))
    assert kept.find("third", torch.empty(8, dtype=torch.uint8))
