"""mark_only_lora_as_trainable, against loralib's, and parameters that are tied."""

import copy

import loralib
import peft
import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, mark_only_lora_as_trainable, print_trainable_parameters
from lora_kernels.layers.conv import ConvLoRA
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from tests.model.nets import Net, trainable


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_mark_only_lora_marks_what_loralib_marks(bias):
    def build(lora):
        return nn.ModuleDict(
            {
                "lin": lora.Linear(4, 4, r=2),
                "plain": nn.Linear(4, 4),
                "qkv": lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]),
                "embed": lora.Embedding(5, 4, r=2),
                "attention": nn.MultiheadAttention(4, 2),
                "norm": nn.LayerNorm(4),
            }
        )

    class Ours:
        Linear, MergedLinear, Embedding = LoRALinear, LoRAMergedLinear, LoRAEmbedding

    theirs, ours = build(loralib), build(Ours)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert mark_only_lora_as_trainable(ours, bias) is None
    assert trainable(ours) == trainable(theirs)


def test_mark_only_lora_opens_the_bias_of_a_convolution():
    model = nn.ModuleDict({"conv": ConvLoRA(nn.Conv2d, 2, 2, 3, r=2), "lin": nn.Linear(2, 2)})
    mark_only_lora_as_trainable(model, "lora_only")
    assert trainable(model) == {"conv.lora_A", "conv.lora_B", "conv.conv.bias"}


def test_mark_only_lora_opens_nothing_by_the_name_of_a_module():
    model = nn.ModuleDict(
        {
            "lora_encoder": nn.Linear(2, 2),
            "relative_attention_bias": nn.Embedding(3, 2),
            "lin": LoRALinear(2, 2, r=1),
        }
    )
    mark_only_lora_as_trainable(model, "none")
    assert trainable(model) == {"lin.lora_A", "lin.lora_B"}
    mark_only_lora_as_trainable(model, "all")
    assert trainable(model) == {"lin.lora_A", "lin.lora_B", "lin.bias", "lora_encoder.bias"}


def test_mark_only_lora_leaves_a_users_own_lora_parameter_as_it_is():
    model = nn.Module()
    model.lora_gate = nn.Parameter(torch.ones(2))
    model.lora_table = nn.Parameter(torch.ones(2), requires_grad=False)
    model.other = nn.Parameter(torch.ones(2))
    mark_only_lora_as_trainable(model)
    assert trainable(model) == {"lora_gate"}


def test_mark_only_lora_opens_frozen_factors():
    model = nn.Sequential(LoRALinear(2, 2, r=1)).requires_grad_(False)
    mark_only_lora_as_trainable(model)
    assert trainable(model) == {"0.lora_A", "0.lora_B"}


def test_mark_only_lora_opens_a_tied_bias_wherever_it_comes_first():
    model = nn.Sequential(nn.Linear(2, 2), LoRALinear(2, 2, r=1))
    model[0].bias = model[1].bias
    mark_only_lora_as_trainable(model, "lora_only")
    assert model[1].bias.requires_grad


def test_mark_only_lora_opens_modules_to_save_and_the_next_one_forgets_them():
    model = Net()
    apply_lora(
        model, r=2, lora_alpha=4, target_modules=["query"], modules_to_save=["head", "0.norm"]
    )
    lora = {f"blocks.{i}.query.lora_{x}" for i in range(3) for x in "AB"}
    whole = {"head.weight", "head.bias", "blocks.0.norm.weight", "blocks.0.norm.bias"}
    assert trainable(model) == lora | whole
    mark_only_lora_as_trainable(model, modules_to_save="head")
    assert trainable(model) == lora | {"head.weight", "head.bias"}
    mark_only_lora_as_trainable(model)
    assert trainable(model) == lora


def test_mark_only_lora_leaves_integer_parameters_of_saved_modules_untrained():
    model = nn.Sequential(nn.Linear(2, 2), LoRALinear(2, 2, r=1))
    model[0].table = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    mark_only_lora_as_trainable(model, modules_to_save=["0"])
    assert trainable(model) == {"0.weight", "0.bias", "1.lora_A", "1.lora_B"}


@pytest.mark.parametrize("bias", ["some", None, "None"])
def test_mark_only_lora_raises_for_another_bias(bias):
    with pytest.raises(NotImplementedError, match=str(bias)):
        mark_only_lora_as_trainable(Net(), bias)


def test_untie_keeps_ties_within_a_saved_module(seed):
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": head, "other": nn.Linear(4, 4)})
    model["other"].bias = head[0].bias
    apply_lora(model, r=1, lora_alpha=1, target_modules=["body"], modules_to_save=["head"])
    assert head[1].weight is head[0].weight
    assert head[0].bias is not model["other"].bias
    assert torch.equal(head[0].bias, model["other"].bias)
    assert not model["other"].bias.requires_grad


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.print_trainable_parameters()
    ours = apply_lora(base, r=2, lora_alpha=2, target_modules=["0"])
    print_trainable_parameters(ours)
    expected, printed = capsys.readouterr().out.splitlines()
    assert printed == expected
    print_trainable_parameters(nn.Module())
    assert capsys.readouterr().out.startswith("trainable params: 0 || all params: 0")
