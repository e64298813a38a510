"""eval() merges, train() restores. One test, every layer."""

import copy

import loralib
import pytest
import torch

from tests.layers.cases import build, every_layer, example, filled, unmerged_output


@every_layer
def test_merged_and_unmerged_outputs_agree(make, seed, device):
    layer = build(make, device, dtype=torch.float64).eval()
    assert layer.merged
    x = example(layer, device)
    torch.testing.assert_close(layer(x), unmerged_output(layer, x), rtol=1e-12, atol=1e-12)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_train_restores_the_base_bit_for_bit_after_a_thousand_cycles(make, dtype, seed, device):
    layer = build(make, device, dtype=dtype)
    base = layer.weight.detach().clone()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert torch.equal(layer.weight, base)


def test_train_of_loralib_lets_the_base_drift(seed):
    layer = filled(loralib.Linear(12, 20, r=3, dtype=torch.bfloat16), "cpu")
    base = layer.weight.detach().clone()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert not torch.equal(layer.weight, base)


@every_layer
def test_eval_rounds_the_delta_once_and_keeps_the_base_in_host_memory(make, seed, device):
    layer = build(make, device, dtype=torch.bfloat16)
    exact = layer.base_weight().float() + layer.delta_weight()
    assert layer.delta_weight().dtype == torch.float32
    layer.eval()
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    assert layer.base_weight().device.type == "cpu"


@every_layer
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "scaling"])
def test_edits_while_merged_take_effect_at_the_next_forward(make, name, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    x = example(layer, device)
    before = layer(x)
    if name == "scaling":
        layer.scaling *= 3
    else:
        with torch.no_grad():
            getattr(layer, name).mul_(3)
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, unmerged_output(layer, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.train().weight, base)


@every_layer
def test_merged_eval_gives_the_adapter_no_gradient_and_merge_weights_false_does(make, seed, device):
    layer = build(make, device).eval()
    x = example(layer, device).requires_grad_()
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None
    assert x.grad is not None
    layer = build(make, device, merge_weights=False).eval()
    layer(x).sum().backward()
    assert not layer.merged
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


@every_layer
def test_cast_while_merged_casts_the_base_and_merges_again(make, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    layer.to(torch.bfloat16)
    assert layer.merged
    cast = copy.deepcopy(layer).train()
    assert torch.equal(cast.weight, base.to(torch.bfloat16))
    assert torch.equal(layer.weight, cast.merged_weight())


@every_layer
def test_eval_twice_train_twice(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    merged = layer.merged_weight()
    for _ in range(2):
        assert torch.equal(layer.eval().weight, merged)
    for _ in range(2):
        assert torch.equal(layer.train().weight, base)


@every_layer
def test_eval_merges_inside_inference_mode(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    with torch.inference_mode():
        layer.eval()
        layer(example(layer, device))
    assert torch.equal(layer.train().weight, base)
    assert layer.weight.requires_grad is False


@every_layer
@pytest.mark.parametrize("mode", [True, False])
def test_merge_weights_turned_off_while_merged_restores_at_the_next_switch(
    make, mode, seed, device
):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    layer.eval()
    layer.merge_weights = False
    layer.train(mode)
    assert not layer.merged
    assert torch.equal(layer.weight, base)


@every_layer
def test_weight_stays_the_same_object_through_merging(make, seed, device):
    layer = build(make, device)
    weight, address = layer.weight, layer.weight.data_ptr()
    layer.eval()
    assert layer.weight is weight
    layer.train()
    assert layer.weight is weight
    assert weight.data_ptr() == address
