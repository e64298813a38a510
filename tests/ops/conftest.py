"""What ops ask the dispatcher for."""

import pytest

from lora_kernels.dispatch.algorithm import Algorithm, GemmShape
from lora_kernels.ops import library


@pytest.fixture
def asked(monkeypatch) -> list[GemmShape]:
    """The shapes for which ops have asked for an algorithm; each of them runs the reference."""
    shapes = []

    def choose(shape):
        shapes.append(shape)
        return Algorithm("reference", "because")

    monkeypatch.setattr(library.algorithm, "choose", choose)
    return shapes
