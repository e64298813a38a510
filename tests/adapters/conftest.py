"""Models that adapters are for: with every kind of layer, and one that ties its head."""

import pytest
import torch

from tests.adapters.nets import Net
from tests.adapters.tied import is_tied, tied_llama


@pytest.fixture
def ids(seed, device):
    return torch.randint(0, 11, (4, 5), device=device)


@pytest.fixture
def base(seed, device):
    return Net().double().to(device)


@pytest.fixture
def tied_base(seed, device):
    model = tied_llama().to(device)
    assert is_tied(model)
    return model
