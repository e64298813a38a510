"""A base weight that something else holds is not merged. One test, every layer."""

import pytest
import torch
from torch import nn

from tests.layers.cases import build, every_layer, example, unmerged_output


@every_layer
def test_tied_weight_is_not_merged_and_both_layers_are_right(make, seed, device):
    layer = build(make, device)
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    base = layer.weight.detach().clone()
    x = example(layer, device)
    expected = unmerged_output(layer, x)
    layer.eval()
    assert not layer.merged
    assert torch.equal(other.weight, base)
    assert torch.equal(layer(x), expected)
    del other
    layer.eval()  # nobody shares it any more
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


@every_layer
@pytest.mark.parametrize("view", ["part", "reshaped", "data"])
def test_weight_that_shares_memory_is_not_merged(make, view, seed, device):
    layer = build(make, device)
    weight = layer.weight.detach()
    shared = {
        "part": lambda: weight[:1],
        "reshaped": lambda: weight.view(-1),
        "data": lambda: weight,
    }
    holder = nn.ParameterList([nn.Parameter(shared[view]())])
    layer.eval()
    assert not layer.merged
    assert holder[0].data_ptr() == layer.weight.data_ptr()


@every_layer
def test_ties_that_come_and_go_are_seen_anew(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    layer.eval()
    layer.train()
    del optimizer
    base = layer.weight.detach().clone()
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    assert not layer.eval().merged
    del other
    assert layer.eval().merged
    other = nn.Linear(1, 1)
    other.weight = layer.weight  # tied while merged: the next eval() gives it the base
    assert not layer.eval().merged
    assert torch.equal(other.weight, base)


@every_layer
def test_buffer_that_shares_memory_counts(make, seed, device):
    layer = build(make, device)
    holder = nn.Module()
    holder.register_buffer("table", layer.weight.detach())
    assert not layer.eval().merged
    assert holder.table.data_ptr() == layer.weight.data_ptr()


@every_layer
def test_references_of_others_than_modules_do_not_stop_merging(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    assert layer.eval().merged
    assert optimizer.param_groups[0]["params"]
