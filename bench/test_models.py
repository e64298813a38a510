"""A Llama-3-8B decoder layer with all its linears under LoRA, and GPT-2 medium with c_attn."""

from bench import models, rows

PROVIDERS = models.MODEL_PROVIDERS


def cells(layers, device, asked):
    """Only where no set of layers was asked for."""
    return [] if asked else models.model_cells(device)


def test_models(row, enforced):
    assert not (enforced and rows.lost(row)), row["ours_over_peer"]
