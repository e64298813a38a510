"""Which modules target_modules means, and which of them cannot be wrapped."""

import math
import warnings

import peft
import pytest
import torch
from torch import nn

from lora_kernels import apply_lora
from lora_kernels.model.paths import adapted_layers
from lora_kernels.model.targets import Hyperparameters, LayerSpec, name_targets
from tests.model import wrapped
from tests.model.nets import Net, layers_of
from tests.tiny_models import tiny_moe


def test_target_modules_as_one_name_means_the_modules_of_that_name():
    model = apply_lora(Net(), r=2, lora_alpha=4, target_modules="query")
    assert set(layers_of(model)) == {f"blocks.{i}.query" for i in range(3)}


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_all_linear_leaves_the_projection_that_attention_reads_by_itself():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"0\.out_proj \(NonDynamicallyQuantizableLinear\)"):
        apply_lora(model, r=2, lora_alpha=4)
    assert set(layers_of(model)) == {"1"}
    with pytest.raises(ValueError, match=r"0\.out_proj \(NonDynamicallyQuantizableLinear\)"):
        apply_lora(nn.Sequential(nn.MultiheadAttention(8, 2)), r=2, lora_alpha=4,
                   target_modules=["out_proj"])  # fmt: skip


def test_target_modules_means_nothing_inside_a_wrapped_convolution():
    model = nn.Sequential()
    model.conv = nn.Conv2d(2, 2, 3)
    model.lin = nn.Linear(2, 2)
    apply_lora(model, r=2, lora_alpha=4, target_modules=["conv"])
    apply_lora(model, r=2, lora_alpha=4, target_modules=["lin"])
    with pytest.raises(
        ValueError, match=r"matches 'conv\.conv' alone, which is inside a LoRA layer"
    ):
        apply_lora(model, r=2, lora_alpha=4, target_modules=["conv.conv"])
    with pytest.raises(ValueError, match=r"conv \(LoRAConv2d\).*already"):
        apply_lora(model, r=2, lora_alpha=4, target_modules=["conv"])


def test_target_modules_cannot_mean_weights_that_are_computed():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="0 "):
        apply_lora(model, r=2, lora_alpha=4)
    assert set(layers_of(model)) == {"1"}
    with pytest.raises(ValueError, match=r"0 \(ParametrizedLinear\)"):
        apply_lora(model, r=2, lora_alpha=4, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older weight_norm is deprecated
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0 \(Linear\).*computed"):
        apply_lora(old, r=2, lora_alpha=4)


def test_target_modules_cannot_mean_a_module_with_a_replaced_forward():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"0 \(Linear\).*forward"):
        apply_lora(model, r=2, lora_alpha=4)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ["lin", "up.lin"]),
        (["linear", "lin.x"], ["lin", "up.lin"]),
        (["down.lin"], r"lin|up\.lin"),
        (["x.up.lin"], r"lin|up\.lin"),
    ],
)
def test_name_targets_means_its_paths_and_no_others(others, expected):
    assert name_targets(["up.lin", "lin"], others) == expected


def test_pattern_keys_that_match_nothing_have_the_warning_of_peft(recwarn):
    options = {
        "rank_pattern": {"query": 3, "blocks.9.query": 2},
        "alpha_pattern": {"value": 5, "typo": 1, ".*query": 2},
    }
    model = apply_lora(Net(), r=2, lora_alpha=4, target_modules=["query", "value"], **options)
    (ours,) = (str(w.message) for w in recwarn if w.category is RuntimeWarning)
    assert "rank_pattern: 'blocks.9.query' (did you mean 'blocks." in ours
    assert ours.endswith("; alpha_pattern: 'typo'")
    assert {layer.r for layer in layers_of(model).values()} == {2, 3}
    recwarn.clear()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], **options)
    peft.get_peft_model(Net(), config)
    theirs = " ".join(str(w.message) for w in recwarn if "did not match" in str(w.message))
    if theirs:  # versions before 0.21 are silent
        assert "['blocks.9.query']" in theirs
        assert "['typo']" in theirs


def test_hyperparameters_are_looked_up_by_path():
    numbers = Hyperparameters(4, 8, 0.1, {"up": 2, "u": 3}, {r"up|down": 6}, use_rslora=True)
    assert numbers.of("block.up") == LayerSpec(2, 6, 6 / math.sqrt(2), 0.1)
    assert numbers.of("down") == LayerSpec(4, 6, 3.0, 0.1)
    assert numbers.of("up.gate") == LayerSpec(4, 8, 4.0, 0.1)
    with pytest.raises(ValueError, match=r"LoRA on 'up': r must be an integer >= 0, got 2\.5"):
        Hyperparameters(4, 8, rank_pattern={"up": 2.5}).of("up")


def test_all_linear_names_the_stacked_experts_that_it_leaves_out():
    model = tiny_moe("qwen3_moe")
    with pytest.warns(UserWarning, match="stacks of matrices") as caught:
        apply_lora(model, r=2, lora_alpha=4)
    (message,) = {str(w.message) for w in caught}
    assert (
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in message
    )
    assert len(caught) == 1


def test_all_linear_is_silent_about_other_parameters_of_three_dimensions(recwarn):
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 4, 8))
            own_conv = type("OwnConv1d", (nn.Conv1d,), {})
            self.conv, self.lin = own_conv(4, 4, 3), nn.Linear(8, 8)

    apply_lora(Patches(), r=2, lora_alpha=4)
    assert not recwarn.list


@pytest.mark.parametrize(
    "targets", [["blocks.1._orig_mod.up", "single._orig_mod"], ["up", "single"],
                r"(blocks\.1\._orig_mod\.up|single\._orig_mod)", "blocks.1._orig_mod.up"],
)  # fmt: skip
def test_names_with_and_without_wrappers_mean_the_same_modules(targets):
    model = wrapped.with_compiled_parts(wrapped.Net())
    patterns = {"rank_pattern": {"blocks.1._orig_mod.up": 3}, "modules_to_save": ["head"]}
    apply_lora(model, r=2, lora_alpha=4, target_modules=targets, **patterns)
    layers = adapted_layers(model)
    expected = {"blocks.0.up", "blocks.1.up", "single"} if targets == ["up", "single"] else (
        {"blocks.1.up", "single"} if "single" in str(targets) else {"blocks.1.up"})  # fmt: skip
    assert set(layers) == expected
    assert layers["blocks.1.up"].r == 3
