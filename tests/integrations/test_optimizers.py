"""Optimizers that choose by the names or classes of parameters, on own layers."""

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lora_kernels as lora


def test_loraplus_gives_lora_b_its_rate_and_an_embedding_the_rate_that_it_is_passed():
    """The way out that LoRAEmbedding documents: PEFT knows embeddings by its own class."""
    model = nn.ModuleDict(
        {"embed": lora.Embedding(8, 4, r=2), "lin": lora.Linear(4, 4, r=2, lora_alpha=2)}
    )
    lora.mark_only_lora_as_trainable(model)
    embedding = [model["embed"].lora_A, model["embed"].lora_B]
    for factor in embedding:
        factor.requires_grad_(False)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    for factor in embedding:
        factor.requires_grad_(True)
    optimizer.add_param_group({"params": embedding, "lr": 1e-6})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates == {
        "embed.lora_A": 1e-6, "embed.lora_B": 1e-6, "lin.lora_A": 1e-4, "lin.lora_B": 16e-4,
    }  # fmt: skip
