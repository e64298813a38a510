"""MultiLoRALinear: construction, names and what it refuses; test_route.py has what it computes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lora
from lora_kernels.testing.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("seed")
ADAPTERS = {"a": {"r": 2, "lora_alpha": 4}, "b": {"r": 3, "lora_dropout": 0.5}}


def filled(layer):
    with torch.no_grad():
        for name in layer.adapters:
            layer.factors(name)[1].normal_()
    return layer


def test_each_adapter_has_parameters_and_values_of_its_own():
    layer = lora.MultiLoRALinear(6, 5, ADAPTERS)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (5, 6), "bias": (5,), "lora_A_a": (2, 6), "lora_B_a": (5, 2),
        "lora_A_b": (3, 6), "lora_B_b": (5, 3),
    }  # fmt: skip
    assert not layer.weight.requires_grad
    assert layer.lora_A_a.any()
    assert not layer.lora_B_b.any()
    assert layer.adapters["a"].scaling == 2
    assert layer.adapters["b"].lora_dropout == 0.5
    assert "adapters=(a: r=2, b: r=3)" in repr(layer)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_from_linear_wraps_the_same_parameters(make, dtype):
    linear = make().to(torch.bfloat16).eval()
    layer = filled(lora.MultiLoRALinear.from_linear(linear, ADAPTERS, dtype))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.lora_A_a.dtype == (dtype or torch.bfloat16)
    x = torch.randn(4, 3, 6, dtype=torch.bfloat16)
    with lora.route(layer, ["b", "a", None, "a"]):
        y = layer(x)
    expected, exact = linear(x), copy.deepcopy(linear).double()(x.double())
    for i, name in ((0, "b"), (1, "a"), (3, "a")):
        alone = layer.alone(name)
        expected[i], exact[i] = alone(x[i]), copy.deepcopy(alone).double()(x[i].double())
    assert_close(y, exact, expected)


def test_autocast_casts_the_base_and_not_the_factors():
    layer = filled(lora.MultiLoRALinear(6, 5, ADAPTERS)).eval()
    x = torch.randn(2, 6)
    with lora.route(layer, ["a", "b"]), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = [layer.alone(name)(x[i]) for i, name in enumerate("ab")]
    assert y.dtype == torch.bfloat16
    exact = torch.stack([layer.alone(n).double()(x[i].double()) for i, n in enumerate("ab")])
    assert_close(y, exact, torch.stack(expected))


def test_copies_and_pickles_compute_the_same():
    layer, x = filled(lora.MultiLoRALinear(6, 5, ADAPTERS)).eval(), torch.randn(2, 6)
    outputs = []
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with lora.route(twin, ["a", "b"]):
            outputs.append(twin(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_layer_made_on_the_meta_device_draws_what_transformers_leaves_undrawn():
    layer = lora.MultiLoRALinear(6, 5, ADAPTERS, device="meta")
    layer.lora_A_a = nn.Parameter(torch.full((2, 6), torch.nan))
    layer.lora_B_a = nn.Parameter(torch.full((5, 2), torch.nan))
    layer._is_hf_initialized = True
    assert layer.lora_A_a.isfinite().all()
    assert not layer.lora_B_a.any()


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, "adapters must map at least one name"),
        (["a"], "adapters must map at least one name"),
        ({"a.b": {"r": 2}}, "without '.', got 'a.b'"),
        ({"": {"r": 2}}, "at least one character"),
        ({3: {"r": 2}}, "got 3"),
        ({"a": {"lora_alpha": 2}}, r"adapters\['a'\] must be a mapping of r"),
        ({"a": {"r": 2, "rank": 2}}, r"adapters\['a'\] must be a mapping of r"),
        ({"a": {"r": 0}}, r"adapters\['a'\]: r must be an integer >= 1, got 0"),
        ({"a": {"r": 2, "lora_dropout": 1}}, r"lora_dropout must be in \[0, 1\), got 1"),
    ],
)
def test_bad_adapters_are_named(adapters, message):
    with pytest.raises(ValueError, match=message):
        lora.MultiLoRALinear(6, 5, adapters)


def test_an_adapter_that_is_there_or_is_not_is_named():
    layer = lora.MultiLoRALinear(6, 5, ADAPTERS)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        layer.add_adapter("a", layer.adapters["b"])
    assert layer.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="has no adapter 'z', only 'a', 'b'"):
        layer.factors("z")
    layer.add_adapter("c", layer.adapters["b"])
    assert layer.lora_A_c.shape == (3, 6)


def test_inputs_that_do_not_fit_are_refused_by_the_layer():
    layer = lora.MultiLoRALinear(6, 5, ADAPTERS)
    with lora.route(layer, ["a"]), pytest.raises(ValueError, match=r"MultiLoRALinear\(.*x must"):
        layer(torch.ones(1, 7))
    with pytest.raises(NotImplementedError, match="takes dense tensors alone"):
        torch.jit.trace(layer, torch.ones(1, 6))
