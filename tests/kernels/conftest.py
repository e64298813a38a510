"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch

from lora_kernels.kernels import config, split_terms
from tests.kernels import races


@pytest.fixture
def allow_tf32(request) -> Iterator[bool]:
    """torch's permission to multiply float32 as TF32, as the parameter says, for one test."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def hopper(monkeypatch):
    """Meta tensors count as tensors of an H200."""
    monkeypatch.setattr(config, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(config, "num_sms", lambda device: 132)


@pytest.fixture(params=["apart", "side by side"])
def terms(request, monkeypatch, device) -> str:
    """How dots take the terms of a factor: each has one of its own, or all have one."""
    chosen = (config.target_of(device),) if request.param == "side by side" else ()
    monkeypatch.setattr(split_terms, "SIDE_BY_SIDE", chosen)
    return request.param


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    with races.noticed():
        yield
