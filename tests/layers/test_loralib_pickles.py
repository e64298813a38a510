"""Models that torch.save has pickled with loralib's classes become layers of this package."""

from unittest import mock

import loralib
import pytest
import torch
from torch import nn

import lora_kernels as lora

MAKE = {
    "Linear": lambda: loralib.Linear(8, 6, r=2, lora_alpha=4, lora_dropout=0.1),
    "fan_in_fan_out": lambda: loralib.Linear(
        8, 6, r=2, lora_alpha=4, lora_dropout=0.1, fan_in_fan_out=True
    ),
    "MergedLinear": lambda: loralib.MergedLinear(
        8, 6, r=2, lora_alpha=4, lora_dropout=0.1, enable_lora=[True, False, True]
    ),
    "Conv2d": lambda: loralib.Conv2d(8, 6, 3, r=2, lora_alpha=4, lora_dropout=0.1),
    "r=0": lambda: loralib.Linear(8, 6, r=0, lora_dropout=0.1),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_a_model_goes_on_as_it_was(kind, training, merge_weights, tmp_path, seed):
    old = MAKE[kind]()
    old.merge_weights = merge_weights
    if hasattr(old, "lora_B"):
        nn.init.normal_(old.lora_B)
    shape = (2, 8, 5, 5) if kind == "Conv2d" else (3, 8)
    x = torch.randn(shape)
    weight_of = (lambda m: m.conv.weight) if kind == "Conv2d" else (lambda m: m.weight)
    base = weight_of(old).detach().clone()
    old.eval()  # loralib's returns nothing
    expected = old(x).detach()
    old.train(training)
    torch.save(nn.Sequential(old), tmp_path / "model.pt")

    with mock.patch.dict("sys.modules", {"loralib": lora, "loralib.layers": lora.layers}):
        (new,) = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(new).__module__.startswith("lora_kernels.")
    assert new.training is training
    repr(new)
    close(weight_of(new), base)
    if not training:
        close(new(x), expected)
    for _ in range(2):
        close(new.eval()(x), expected)
        assert new.merged is merge_weights
        close(weight_of(new.train()), base)
        assert not new.merged
    old.eval()
    if merge_weights:
        close(new.merged_weight(), weight_of(old))
    if new.has_lora:
        new(x).sum().backward()
        assert new.lora_A.grad is not None
    assert new.state_dict().keys() == old.state_dict().keys()
    again = MAKE[kind]()
    again.load_state_dict(new.state_dict())
    again.eval()
    close(again(x), expected)
