"""Fixtures of every test: the device, and a seed that a failing test prints."""

import os
import random

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def seed() -> int:
    """A fresh seed for this test, set in torch; LORA_KERNELS_TEST_SEED repeats a printed one."""
    value = int(os.environ.get("LORA_KERNELS_TEST_SEED", random.randrange(2**31)))
    print(f"seed: LORA_KERNELS_TEST_SEED={value}")
    torch.manual_seed(value)
    return value
