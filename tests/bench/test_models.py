"""Whole models with adapters: every provider computes the same, and a wrong one is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from bench import models
from bench.providers import Provider

SIZES = {
    "llama3-8b-layer (tiny)": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2-medium (tiny)": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}  # fmt: skip
CELLS = {
    name: models.ModelCell(
        name, tuple(size.items()), batch=2, tokens=8, r=2, dropout_p=0.1, checkpointing=False,
        dtype=torch.float32, device="cpu",
    )
    for name, size in SIZES.items()
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        pytest.param(name, provider, id=f"{provider.name}-{name}")
        for name, cell in CELLS.items()
        for provider in models.MODEL_PROVIDERS
        if provider.takes(cell)
    ],
)
def test_provider_computes_what_the_formula_does(name, provider):
    subject = CELLS[name].subject()
    subject.check(provider)
    trains = any(parameter.requires_grad for parameter in subject.build(provider).parameters())
    assert trains == (provider.name != "frozen")


def test_llama_has_seven_adapters_and_gpt2_one_a_block():
    llama, gpt2 = (cell.subject().adapters for cell in CELLS.values())
    assert len(llama) == 7
    assert len(gpt2) == 2
    (a, b), *_ = gpt2.values()
    assert (a.shape, b.shape) == ((4, 16), (32, 2))


def test_model_with_a_wrong_layer_is_refused():
    def wrong(model, adapters, dropout_p):
        models.put_formula(model, adapters, dropout_p)
        layer = next(m for m in model.modules() if isinstance(m, models.peers.Formula))
        layer.scaling *= 1.01

    subject = CELLS["llama3-8b-layer (tiny)"].subject()
    with pytest.raises(AssertionError, match=r"wrong da of .*q_proj"):
        subject.check(Provider("wrong", wrong))


def test_checkpointing_recomputes_each_layer_and_changes_no_gradient():
    ours = next(p for p in models.MODEL_PROVIDERS if p.name == "lora_kernels")
    plain = CELLS["llama3-8b-layer (tiny)"]
    gradients, forwards = [], []
    for checkpointing in (False, True):
        subject = dataclasses.replace(plain, checkpointing=checkpointing, dropout_p=0.5).subject()
        model = subject.build(ours)
        calls = []
        attention = next(m for m in model.modules() if type(m).__name__ == "LlamaAttention")
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(1)
        y = model(subject.x.requires_grad_())
        gradients.append(torch.autograd.grad(y, trained, subject.dy))
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain_grad, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain_grad, recomputed)


def test_building_a_provider_leaves_the_model_itself_alone():
    subject = CELLS["gpt2-medium (tiny)"].subject()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for provider in models.MODEL_PROVIDERS:
        if provider.takes(subject.cell):
            subject.build(provider)
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(m, nn.Dropout) and m.p for m in subject.model.modules())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_llama_layer_comes_with_and_without_checkpointing(device):
    cells = models.model_cells(device)
    assert [cell.checkpointing for cell in cells] == [False, True, False]
    assert {cell.fields()["kind"] for cell in cells} == {"model"}
    assert len({str(cell) for cell in cells}) == 3
