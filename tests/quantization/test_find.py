"""Which layers have a frozen weight, asked of layers of every kind and of others."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_kernels.quantization import FrozenWeight, find, frozen_weight
from tests.quantization.dense import assert_product, assert_refused
from tests.quantized import INEXACT, KINDS, quantised


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_found(kind, seed):
    layer = quantised(kind)
    weight = find(layer)
    assert isinstance(weight, FrozenWeight)
    assert frozen_weight(layer).shape == (64, 128)
    assert weight.device == torch.device("cpu")
    assert weight.exact == (kind not in INEXACT)
    if weight.exact:
        assert_product(layer, torch.randn(2, 3, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_its_own_is_refused(kind):
    layer = quantised(kind)
    layer.forward = functools.partial(type(layer).forward, layer)  # as accelerate's hooks do
    assert_refused(layer, "it has a forward of its own, .*: remove that")
    del layer.forward
    assert isinstance(find(layer), FrozenWeight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_forward_is_refused(kind, monkeypatch):
    layer = quantised(kind)
    assert isinstance(find(layer), FrozenWeight)
    own = type(layer).forward

    @functools.wraps(own)
    def forward(self, x):
        return own(self, x) + 1

    monkeypatch.setattr(type(layer), "forward", forward)
    assert_refused(layer, f"{type(layer).__name__}.forward has been replaced: undo that patch")
    del forward.__wrapped__
    forward.__module__ = __name__  # of a class of the same name, then
    assert_refused(layer, f"{type(layer).__name__}.forward has been replaced: undo that patch")
    monkeypatch.undo()
    assert isinstance(find(layer), FrozenWeight)


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_are_of_another_kind(kind):
    layer = quantised(kind)
    layer.__class__ = type("Mine", (type(layer),), {})
    assert_refused(layer, "no class that this package knows: pass a dense weight", TypeError)


def test_others_are_refused():
    for other in (nn.Conv1d(3, 4, 1), nn.Embedding(3, 4), "nf4", None):
        assert_refused(other, "no class that this package knows", TypeError)
    for weight in (torch.ones(2, 2), quantised("nf4").weight):
        assert_refused(weight, "it is a tensor: pass the layer that holds it", TypeError)


@pytest.mark.parametrize("package", ["gptqmodel", "awq", "aqlm", "eetq"])
def test_quantisers_that_are_not_supported_say_so(package):
    kind = type("TorchLinear", (nn.Module,), {"__module__": f"{package}.nn_modules.qlinear"})
    assert_refused(kind(), "is not supported: train over it with PEFT", TypeError)


def test_what_is_found_is_the_state_of_now():
    layer = quantised("torchao-int8")
    assert isinstance(find(layer), FrozenWeight)
    layer.weight = nn.Parameter(layer.weight.dequantize())
    assert_refused(layer, "dense: pass the weight itself", TypeError)


def test_no_quantiser_is_imported():
    code = (
        "import sys, torch, lora_kernels\n"
        "from lora_kernels.quantization import NotFrozen, find\n"
        "assert isinstance(find(torch.nn.Linear(2, 2)), NotFrozen)\n"
        "libraries = 'bitsandbytes', 'torchao', 'hqq', 'optimum', 'transformers', 'gptqmodel'\n"
        "print([name for name in libraries if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
