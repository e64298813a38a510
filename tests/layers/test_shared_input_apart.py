"""Joined layers that turn out to see different inputs fall apart, at the cost of one call."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels as lora
from lora_kernels.testing.tolerance import assert_close
from tests.layers.attention import (
    ALONE,
    NAMES,
    SHARED,
    calls_of,
    make,
    traces_joined_layers,
)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_layers_over_different_inputs_fall_apart_for_good(grad, seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    context = torch.randn_like(x)
    with torch.set_grad_enabled(grad):
        assert calls_of(model, x, x) == [SHARED, ALONE]
        assert calls_of(model, x, context) == [SHARED, *[ALONE] * 3]
        assert calls_of(model, x, context) == [ALONE] * 4
        assert calls_of(model, x) == [ALONE] * 4
    assert [getattr(model, name)._shared_input for name in NAMES] == [None] * 3


def positions_for_queries_and_keys(model, x):
    """DETR's."""
    moved = x + 1
    return model.q_proj(moved) + model.k_proj(moved).sum() + model.v_proj(x).sum()


def another_tensor_each(model, x):
    """The first is freed before the second is made."""
    return model.q_proj(x + 1) + model.k_proj(x + 1).sum() + model.v_proj(x + 1).sum()


def x_changes_in_between(model, x):
    x = x.clone()
    return model.q_proj(x) + model.k_proj(x.add_(1)).sum() + model.v_proj(x.add_(1)).sum()


def gradients_of_some(model, x):
    with torch.set_grad_enabled(not torch.is_grad_enabled()):
        q = model.q_proj(x)
    return q + model.k_proj(x).sum() + model.v_proj(x).sum()


def hook_gives_another_x(model, x):
    handle = model.k_proj.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    y = model(x)
    handle.remove()
    return y


CASES = (
    positions_for_queries_and_keys, another_tensor_each, x_changes_in_between,
    gradients_of_some, hook_gives_another_x,
)  # fmt: skip


@pytest.mark.parametrize("run", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_layers_that_cannot_share_compute_alone_behind_the_first_call(grad, run, seed, device):
    model, x = make(device)
    shared = copy.deepcopy(model)
    lora.share_inputs(shared)
    with torch.set_grad_enabled(grad):
        baseline, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
        for _ in range(2):
            assert_close(run(shared, x), exact, baseline, "y")
        assert calls_of(run, shared, x) == calls_of(run, model, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_fall_apart_under_checkpointing(use_reentrant, seed, device):
    model, x = make(device, dropout=0.3)
    lora.share_inputs(model)
    context = torch.randn_like(x)
    copies, results = [copy.deepcopy(model) for _ in range(2)], []
    for twin, way in zip(copies, (call, checkpointed(use_reentrant)), strict=True):
        torch.manual_seed(3)
        grads = []
        for _ in range(3):
            leaf = x.detach().requires_grad_()
            way(twin, leaf, context).square().sum().backward()
            grads.append(leaf.grad)
        results.append([*grads, *(p.grad for p in twin.parameters() if p.requires_grad)])
        assert twin.q_proj._shared_input is None
    for direct, recomputed in zip(*results, strict=True):
        assert torch.equal(direct, recomputed)


def call(model, *inputs):
    return model(*inputs)


def checkpointed(use_reentrant):
    return lambda *args: checkpoint(*args, use_reentrant=use_reentrant)


def test_layers_fallen_apart_can_be_joined_anew_and_in_other_groups(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    context = torch.randn_like(x)
    model(x, context)
    lora.share_inputs(model)
    assert calls_of(model, x) == [SHARED, ALONE]
    lora.share_inputs(model, [("k_proj", "v_proj")])
    for _ in range(2):
        assert calls_of(model, x, context) == [ALONE, SHARED, ALONE]


@traces_joined_layers
@pytest.mark.parametrize("way", ["call", "checkpoint", "reentrant checkpoint"])
def test_compiled_layers_over_different_inputs(way, seed, device):
    model, x = make(device)
    shared, context = copy.deepcopy(model), torch.randn_like(x)
    lora.share_inputs(shared)
    shared.compile(fullgraph=True, backend="aot_eager")
    run = call if way == "call" else checkpointed(use_reentrant="reentrant" in way)
    for _ in range(3):
        assert_same_gradient(run, shared, model, x, context)


@traces_joined_layers
def test_layers_in_graphs_of_their_own(seed, device):
    model, x = make(device)
    shared = copy.deepcopy(model)
    lora.share_inputs(shared)
    for layer in shared.children():
        layer.compile(fullgraph=True, backend="aot_eager")
    for run in (call, checkpointed(use_reentrant=False), call):
        assert_same_gradient(run, shared, model, x, x)


def assert_same_gradient(run, shared, model, x, context):
    def solve(run, model, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        other = leaf if context is x else context.to(dtype)
        y = run(model, leaf, other)
        y.square().sum().backward()
        return y, leaf.grad

    exact = solve(call, copy.deepcopy(model).double(), torch.float64)
    results = solve(run, shared, x.dtype), exact, solve(call, model, x.dtype)
    for actual, reference, baseline in zip(*results, strict=True):
        assert_close(actual, reference, baseline, "compiled")
