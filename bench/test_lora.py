"""LoRA's layers and whole models: never slower than a peer, which --bench-assert enforces."""

import torch

from bench import rows
from bench.cells import select
from bench.models import model_cells


def test_linear(row, enforced):
    assert not (enforced and rows.lost(row)), row["ours_over_peer"]


def test_merged_linear(row, enforced):
    """At least twice as fast as loralib."""
    speedup = 2 if row["implementation"] == "loralib" else 1
    assert not (enforced and rows.lost(row, speedup)), row["ours_over_peer"]


def test_model(row, enforced):
    """A Llama-3-8B decoder layer with all its linears under LoRA, and GPT-2 medium with c_attn."""
    assert not (enforced and rows.lost(row)), row["ours_over_peer"]


def cells(test, device, option):
    """The cells of a test among those that the options choose; models if no set of layers is."""
    if test is test_model:
        return [] if option.shapes or option.factors else model_cells(device)
    axes = ("mode", "execution", "tokens", "ranks", "dropout")
    chosen = {axis: getattr(option, axis) for axis in axes}
    factors = option.factors and getattr(torch, option.factors)
    layers = select(device, option.shapes, factors=factors, **chosen)
    return [cell for cell in layers if cell.merged == (test is test_merged_linear)]
