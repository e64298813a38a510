"""Whole models with adapters: all implementations compute the same, and a wrong one is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from bench import models, peers
from bench.implementations import Implementation
from bench.models import ModelSubject

SIZES = {
    "llama3-8b-layer (tiny)": {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2-medium (tiny)": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}  # fmt: skip
CELLS = {
    name: models.ModelCell(name, tuple(size.items()), batch=2, tokens=8, r=2, device="cpu")
    for name, size in SIZES.items()
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, each, id=f"{each.name}-{name}")
        for name, cell in CELLS.items()
        for each in models.MODEL_IMPLEMENTATIONS
        if each.takes(cell)
    ],
)
def test_check_lets_every_implementation_through(name, implementation):
    subject = ModelSubject(CELLS[name])
    subject.check(implementation)
    built = subject.build(implementation)
    trains = any(parameter.requires_grad for parameter in built.parameters())
    assert trains == (implementation.name != "frozen")


def test_adapters_of_a_llama_are_seven_and_of_gpt2_one_a_block():
    llama, gpt2 = (ModelSubject(cell).adapters for cell in CELLS.values())
    assert len(llama) == 7
    assert len(gpt2) == 2
    (a, b), *_ = gpt2.values()
    assert (a.shape, b.shape) == ((4, 16), (32, 2))


def test_check_refuses_a_wrong_layer():
    def wrong(model, adapters, dropout_p):
        models.put(peers.Formula)(model, adapters, dropout_p)
        layer = next(m for m in model.modules() if isinstance(m, peers.Formula))
        layer.spec = dataclasses.replace(layer.spec, scaling=layer.spec.scaling * 1.01)

    subject = ModelSubject(CELLS["llama3-8b-layer (tiny)"])
    with pytest.raises(AssertionError, match=r"wrong da of .*q_proj"):
        subject.check(Implementation("wrong", wrong))


def test_checkpointing_recomputes_each_layer_and_changes_no_gradient():
    ours = next(p for p in models.MODEL_IMPLEMENTATIONS if p.name == "lora_kernels")
    plain = CELLS["llama3-8b-layer (tiny)"]
    gradients, forwards = [], []
    for checkpointing in (False, True):
        cell = dataclasses.replace(plain, checkpointing=checkpointing, dropout_p=0.5)
        subject = ModelSubject(cell)
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


def test_build_leaves_the_model_itself_alone():
    subject = ModelSubject(CELLS["gpt2-medium (tiny)"])
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for implementation in models.MODEL_IMPLEMENTATIONS:
        if implementation.takes(subject.cell):
            subject.build(implementation)
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(m, nn.Dropout) and m.p for m in subject.model.modules())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_model_cells_have_a_llama_layer_with_and_without_checkpointing(device):
    cells = models.model_cells(device)
    assert [cell.checkpointing for cell in cells] == [False, True, False]
    assert {cell.fields()["kind"] for cell in cells} == {"model"}
    assert len({str(cell) for cell in cells}) == 3
