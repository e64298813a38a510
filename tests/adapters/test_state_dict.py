"""lora_state_dict and merged_state_dict, against loralib and plain models."""

import copy

import loralib
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    apply_lora,
    lora_state_dict,
    merged_state_dict,
)
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv2d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from lora_kernels.model.paths import plain_state, wrapper_prefix
from tests.adapters.nets import (
    KINDS,
    adapted,
    assert_equal_states,
    randomise,
)
from tests.model import wrapped
from tests.tiny_models import tiny_gpt2

# ---- lora_state_dict ----


def both_libraries():
    class Ours:
        Linear, MergedLinear = LoRALinear, LoRAMergedLinear
        Embedding, Conv2d = LoRAEmbedding, LoRAConv2d

    def build(lora):
        return nn.ModuleDict(
            {
                "lin": lora.Linear(4, 4, r=2),
                "plain": nn.Linear(4, 4),
                "qkv": lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True], bias=False),
                "embed": lora.Embedding(5, 4, r=2),
                "norm": nn.LayerNorm(4),
            }
        )

    return build(Ours), build(loralib)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_state_dict_is_loralibs_and_travels_both_ways(bias, seed):
    ours, theirs = both_libraries()
    found, expected = lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert sorted(found) == sorted(expected)
    ours.load_state_dict(expected, strict=False)
    for key, value in lora_state_dict(ours, bias).items():
        assert torch.equal(value, expected[key]), key
    assert not theirs.load_state_dict(found, strict=False).unexpected_keys


def test_lora_state_dict_holds_saved_modules_and_biases_of_convolutions(base):
    ours = adapted(base, target_modules=["conv2"], modules_to_save=["classifier"])
    keys = {"conv2.lora_A", "conv2.lora_B", "classifier.weight", "classifier.bias"}
    assert set(lora_state_dict(ours)) == keys
    assert set(lora_state_dict(ours, "lora_only")) == keys | {"conv2.conv.bias"}
    assert set(lora_state_dict(ours, modules_to_save=["norm"])) == keys | {
        "norm.weight", "norm.bias",
    }  # fmt: skip


def test_lora_state_dict_goes_by_the_last_part_of_a_name():
    model = nn.ModuleDict(
        {
            "lora_encoder": nn.Linear(2, 2),
            "relative_attention_bias": nn.Embedding(3, 2),
            "lin": LoRALinear(2, 2, r=1),
        }
    )
    assert set(lora_state_dict(model)) == {"lin.lora_A", "lin.lora_B"}
    assert set(lora_state_dict(model, "all")) == {
        "lin.lora_A", "lin.lora_B", "lin.bias", "lora_encoder.bias",
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match="'some'"):
        lora_state_dict(model, "some")


def test_lora_state_dict_restores_a_trained_model(base, ids):
    ours = adapted(base, bias="all", modules_to_save=["classifier"]).eval()
    again = apply_lora(copy.deepcopy(base), r=2, lora_alpha=4, target_modules=KINDS)
    again.load_state_dict(lora_state_dict(ours, "all"), strict=False)
    assert_equal_states(again, ours)
    assert torch.equal(again.eval()(ids), ours(ids))


# ---- merged_state_dict ----


@pytest.mark.parametrize("training", [True, False])
def test_merged_state_dict_is_the_plain_models(training, base, ids):
    options = {"bias": "all", "modules_to_save": ["classifier"], "merge_weights": True}
    ours = adapted(base, **options).train(training)
    merged = merged_state_dict(ours)
    assert list(merged) == list(base.state_dict())
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged)
    assert torch.equal(plain(ids), ours.eval()(ids))


def test_merged_state_dict_of_hand_made_layers(seed, device):
    ours = nn.Sequential(
        LoRAMergedLinear(8, 12, r=2, enable_lora=[True, False], fan_in_fan_out=True),
        LoRALinear(12, 4, bias=False),
        ConvLoRA(nn.Conv1d, 4, 2, 1),
    ).to(device)
    randomise(ours)
    plain = nn.Sequential(Conv1D(12, 8), nn.Linear(12, 4, bias=False), nn.Conv1d(4, 2, 1))
    plain.to(device).load_state_dict(merged_state_dict(ours))
    x = torch.randn(4, 3, 8, device=device)
    ours.eval()
    assert torch.equal(plain[1](plain[0](x)), ours[1](ours[0](x)))


def test_merged_state_dict_is_right_on_both_sides_of_a_tie(seed):
    model = tiny_gpt2().eval()
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    ours = adapted(model, target_modules=["wte"]).eval()
    with pytest.warns(
        UserWarning, match=r"transformer\.wte\.weight and lm_head\.weight\. In a model"
    ):
        merged = merged_state_dict(ours)
    assert not torch.equal(merged["transformer.wte.weight"], merged["lm_head.weight"])
    untied.load_state_dict(merged)
    ids = torch.randint(0, 13, (2, 5))
    # One model adds the update to the weights, the other to the activations, through all layers.
    torch.testing.assert_close(untied(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-6)


def test_merged_state_dict_keeps_a_shared_module_shared(seed):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    merged = merged_state_dict(adapted(model, target_modules=["0"]))
    assert merged["0.weight"] is merged["2.weight"]


def test_merged_state_dict_refuses_an_embedding_that_would_limit_its_rows():
    model = nn.Sequential(LoRAEmbedding(5, 4, r=1, max_norm=1.0))
    with pytest.raises(ValueError, match=r"0: .*max_norm"):
        merged_state_dict(model)


@pytest.mark.parametrize(
    "wrap", [wrapped.checkpointed, checkpoint_wrapper, wrapped.with_compiled_parts]
)
def test_state_dicts_of_a_model_with_wrappers_are_the_plain_models(wrap, seed):
    base = wrapped.Net()
    torch.manual_seed(0)
    expected = wrapped.adapted(base)
    torch.manual_seed(0)
    model = wrapped.adapted(wrap(copy.deepcopy(base)))
    wrapped.assert_same(plain_state(model), expected.state_dict())
    wrapped.assert_same(merged_state_dict(model), merged_state_dict(expected))
    wrapped.assert_same(lora_state_dict(model, "all"), lora_state_dict(expected, "all"))
    x = torch.randn(5, 6)
    model(x).sum().backward()
    expected(x).sum().backward()
    for actual, reference in zip(model.parameters(), expected.parameters(), strict=True):
        assert actual.requires_grad == reference.requires_grad
        if reference.requires_grad:
            assert torch.equal(actual.grad, reference.grad)


class InProjection(nn.Module, LoRALayer):
    """A user's own layer: q, k and v of nn.MultiheadAttention, in a weight of another name."""

    def __init__(self, width, r):
        nn.Module.__init__(self)
        LoRALayer.__init__(self, r=r, lora_alpha=1, lora_dropout=0.0, merge_weights=False)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(r, width))
        self.lora_B = nn.Parameter(torch.randn(3 * width, r))

    def forward(self, x):
        weight = self.in_proj_weight + self.lora_B @ self.lora_A * self.scaling
        return nn.functional.linear(x, weight)


class NamedInProjection(InProjection):
    weight_name = "in_proj_weight"

    def delta_weight(self):
        return self.lora_B @ self.lora_A * self.scaling


def test_merged_state_dict_of_a_layer_that_names_its_base_weight(seed):
    layer = NamedInProjection(4, 2).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    state = merged_state_dict(nn.Sequential(layer))
    assert list(state) == ["0.in_proj_weight"]
    actual = nn.functional.linear(x, state["0.in_proj_weight"])
    torch.testing.assert_close(actual, layer(x), rtol=0, atol=1e-12)  # of numbers near ten


def test_merged_state_dict_says_that_a_model_has_no_lora():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(RuntimeWarning, match="merged_state_dict: model has no LoRA layer"):
        assert merged_state_dict(model).keys() == model.state_dict().keys()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("around", [lambda model: model, wrapped.compiled, nn.DataParallel])
def test_lora_state_dict_loads_into_compiled_parts_and_out_of_them(around, strict, seed):
    """By PyTorch's own load_state_dict, also if something is wrapped around the model."""
    base = wrapped.Net()
    model = wrapped.adapted(base, bias="all")
    other = around(wrapped.with_compiled_parts(wrapped.adapted(base, bias="all")))
    state = model.state_dict() if strict else lora_state_dict(model, "all")
    other.load_state_dict({wrapper_prefix(other) + k: v for k, v in state.items()}, strict=strict)
    wrapped.assert_same(plain_state(other), model.state_dict())
    saved = lora_state_dict(other, "all")
    assert not any("_orig_mod" in key.removeprefix("_orig_mod.") for key in saved)
    again = around(wrapped.with_compiled_parts(wrapped.adapted(base, bias="all")))
    again.load_state_dict(saved, strict=False)
    wrapped.assert_same(plain_state(again), model.state_dict())
