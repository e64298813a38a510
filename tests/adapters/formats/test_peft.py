"""PEFT's format, against PEFT: what one saves, the other loads, with the same outputs."""

import copy
import json
import math

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    apply_lora,
    load_adapter,
    mark_only_lora_as_trainable,
    save_adapter,
)
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from tests.adapters.nets import (
    KINDS,
    OPTIONS,
    Net,
    adapted,
    assert_equal_states,
    assert_same,
    load_in_peft,
    randomise,
    with_peft,
)
from tests.adapters.tied import LORA, SAVED, assert_near, in_peft, is_tied, logits, trained
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_saves_what_loads_here_and_gives_the_same_outputs(case, base, ids, tmp_path):
    theirs = with_peft(base, **OPTIONS[case]).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(ours.eval()(ids), theirs(ids))
    opened = {n for n, p in apply_lora(copy.deepcopy(base), r=2, lora_alpha=4,
              **{"target_modules": KINDS, **OPTIONS[case]}).named_parameters()
              if p.requires_grad}  # fmt: skip
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == opened


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_loads_what_is_saved_here_and_gives_the_same_outputs(case, base, ids, tmp_path):
    ours = adapted(base, **OPTIONS[case]).eval()
    save_adapter(ours, tmp_path)
    assert_same(load_in_peft(base, tmp_path)(ids), ours(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_peft_keeps_the_values_of_adapters_over_a_16_bit_base(dtype, autocast, base, ids, tmp_path):
    base = base.to(dtype)
    ours = adapted(base, target_modules=["lin", "mix"], autocast_adapter_dtype=autocast).eval()
    save_adapter(ours, tmp_path)
    theirs = load_in_peft(base, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    key = "lin.lora_A.weight"
    stored = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{key}"]
    assert stored.dtype == (torch.float32 if autocast else dtype)
    assert again.lin.lora_A.dtype == torch.float32
    assert torch.equal(again.lin.lora_A, ours.lin.lora_A.float())
    assert torch.equal(theirs.base_model.model.lin.lora_A["default"].weight, again.lin.lora_A)
    eps = torch.finfo(dtype).eps  # PEFT rounds the update and the sum each by itself
    torch.testing.assert_close(again.eval()(ids), theirs(ids), rtol=8 * eps, atol=8 * eps)


TRANSFORMERS = {
    # PEFT adds "classifier" and "score" for a sequence classifier; the model has only the first.
    "bert": (tiny_bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "gpt2": (tiny_gpt2, {"target_modules": "all-linear", "bias": "lora_only"}),
    # PEFT stores the base weight of a wrapped embed_tokens, too.
    "llama": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens", "down_proj"]}),
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_peft_adapters_of_transformers_models_travel_both_ways(name, seed, device, tmp_path):
    build, options = TRANSFORMERS[name]
    base = build().double().to(device).eval()
    ids = torch.randint(0, 13, (2, 5), device=device)
    theirs = with_peft(base, **options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same(ours(ids).logits, theirs(ids).logits)
    save_adapter(ours, tmp_path / "ours")
    assert_same(load_in_peft(base, tmp_path / "ours")(ids).logits, theirs(ids).logits)


def test_peft_adapter_of_a_resized_vocabulary_brings_its_embedding(seed, device, tmp_path):
    model = tiny_llama().to(device)
    theirs = with_peft(model, target_modules=["q_proj"])
    nn.init.normal_(theirs.base_model.model.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = load_adapter(model, tmp_path)
    assert torch.equal(ours.model.embed_tokens.weight,
                       theirs.base_model.model.model.embed_tokens.weight)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["mix"]},
        {"exclude_modules": r"conv\d"},
        {"target_modules": ["query"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_peft_adapters_that_leave_modules_out_load(options, seed, device, tmp_path):
    base = (tiny_bert() if "layers_to_transform" in options else Net()).to(device)
    theirs = with_peft(base, **options).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path).eval()
    theirs_found = {
        path.removeprefix("base_model.model.")
        for path, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {p for p, m in ours.named_modules() if isinstance(m, LoRALayer)} == theirs_found


# ---- layers that PEFT has not ----


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    ("enable_lora", "out_splits"),
    [([True, False, True], None), ([True, True, True], [6, 3, 3]), ([False, True], [5, 7])],
)
def test_peft_gives_merged_linear_exactly_and_it_comes_back(
    fan_in_fan_out, enable_lora, out_splits, seed, device, tmp_path
):
    base = nn.Sequential(Conv1D(12, 8) if fan_in_fan_out else nn.Linear(8, 12)).double().to(device)
    layer = LoRAMergedLinear.from_linear(
        copy.deepcopy(base[0]), r=3, lora_alpha=5, enable_lora=enable_lora, out_splits=out_splits
    )
    ours = nn.Sequential(layer)
    mark_only_lora_as_trainable(ours)
    randomise(ours)
    save_adapter(ours, tmp_path)
    x = torch.randn(4, 8, dtype=torch.float64, device=device)
    assert_same(load_in_peft(base, tmp_path)(x), ours(x))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert type(again[0]) is LoRAMergedLinear
    assert_equal_states(again, ours)
    assert again[0].enable_lora == layer.enable_lora
    assert again[0].out_splits == layer.out_splits
    assert (again[0].r, again[0].lora_alpha, again[0].scaling) == (3, 5, 5 / 3)
    assert torch.equal(again(x), ours(x))


def test_peft_saves_a_merged_linear_as_a_linear(seed, device, tmp_path):
    base = nn.Sequential(nn.Linear(8, 12)).double().to(device)
    ours = nn.Sequential(
        LoRAMergedLinear.from_linear(copy.deepcopy(base[0]), r=3, enable_lora=[True, False])
    )
    save_adapter(randomise(ours), tmp_path / "ours")
    load_in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert type(again[0]) is LoRALinear
    with pytest.raises(ValueError, match=r"0\.lora_A\.weight.*LoRAMergedLinear"):
        load_adapter(ours, tmp_path / "theirs")


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 1),
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv2d(4, 6, (3, 1)),
        nn.Conv2d(4, 6, 2, padding_mode="reflect"),
        nn.Conv3d(2, 4, 2),
        nn.Conv3d(2, 4, (3, 1, 2), padding=(1, 0, 1)),
    ],
    ids=str,
)
def test_peft_convolutions_travel_both_ways_and_come_back(conv, r, seed, device, tmp_path):
    base = nn.Sequential(conv).double().to(device)
    ours = adapted(base, r=r, lora_alpha=3, target_modules=["0"])
    save_adapter(ours, tmp_path / "ours")
    x = torch.randn(2, conv.in_channels, *[5] * (conv.weight.dim() - 2), device=device).double()
    assert_same(load_in_peft(base, tmp_path / "ours")(x), ours(x))
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert_equal_states(again, ours)
    assert (again[0].r, again[0].lora_alpha, again[0].scaling) == (r, 3, 3 / r)

    theirs = with_peft(base, r=r, lora_alpha=3, target_modules=["0"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same(ours(x), theirs(x))
    first, *rest = conv.kernel_size
    assert ours[0].r == math.ceil(r * math.prod(rest) / first)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 6, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
    ids=str,
)
def test_peft_convolutions_beyond_its_format_raise_both_ways(conv, reason, seed, tmp_path):
    base = nn.Sequential(conv)
    with pytest.raises(ValueError, match=f"0: .*{reason}"):
        save_adapter(adapted(base, target_modules=["0"]), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with_peft(base, target_modules=["0"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"safetensors.*0.*{reason}"):
        load_adapter(base, tmp_path / "theirs")
    assert type(base[0]) is type(conv)


def test_peft_takes_a_dilated_convolution_of_one_tap(seed, tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 6, 1, dilation=2)).double()
    ours = adapted(base, target_modules=["0"])
    save_adapter(ours, tmp_path)
    x = torch.randn(2, 4, 5, 5).double()
    assert_same(load_in_peft(base, tmp_path)(x), ours(x))


# ---- adapter_config.json ----


def test_config_is_read_off_the_layers(base, tmp_path):
    ours = apply_lora(base, r=2, lora_alpha=4, target_modules=["lin"])
    ours.mix = LoRALinear.from_linear(base.mix, r=3, lora_alpha=6, lora_dropout=0.25)
    ours.lin.scaling = 10.0
    ours.lin.lora_dropout.p = 0.25
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] is None
    assert config["target_modules"] == ["lin", "mix"]
    assert config["fan_in_fan_out"] is True
    assert config["lora_dropout"] == 0.25
    assert (config["r"], config["rank_pattern"]) == (2, {"^mix": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (20.0, {"^mix": 6})
    assert config["modules_to_save"] is None
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_keeps_the_base_models_name(tmp_path):
    model = tiny_bert()
    model.config._name_or_path = "some/model"
    save_adapter(apply_lora(model, r=1, lora_alpha=1, target_modules=["query"]), tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "some/model"


def test_config_means_by_a_path_that_ends_others_itself_alone(seed, tmp_path):
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "deep": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    ours = adapted(base, target_modules=r"lin")
    save_adapter(ours, tmp_path)
    assert type(load_adapter(copy.deepcopy(base), tmp_path)["deep"]["lin"]) is nn.Linear
    theirs = load_in_peft(base, tmp_path).base_model.model
    assert type(theirs["deep"]["lin"]) is nn.Linear


def test_config_names_a_saved_module_whose_name_ends_another(seed, tmp_path):
    base = nn.ModuleDict(
        {"head": nn.Linear(4, 4), "pre_head": nn.Linear(4, 4), "lin": nn.Linear(4, 4)}
    )
    ours = adapted(base, target_modules=["lin"], modules_to_save=["head"])
    save_adapter(ours, tmp_path)
    theirs = load_in_peft(base, tmp_path).base_model.model
    x = torch.randn(2, 4)
    for name in ("head", "pre_head"):
        assert torch.equal(theirs[name](x), ours[name](x))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again["head"].weight, ours["head"].weight)


def test_config_keeps_a_lora_layer_whose_name_ends_like_a_saved_module(seed, tmp_path):
    base = nn.ModuleDict({"head": nn.Linear(4, 4), "pre_head": nn.Linear(4, 4)})
    ours = adapted(base, target_modules="all-linear", modules_to_save=["head"])
    save_adapter(ours, tmp_path)
    assert_equal_states(load_adapter(copy.deepcopy(base), tmp_path), ours)
    assert_equal_states(load_adapter(copy.deepcopy(ours), tmp_path), ours)


# ---- a head that is tied to its embedding ----


@SAVED
def test_peft_adapters_of_a_tied_model_travel_both_ways(saved, tied_base, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, **LORA)
    theirs = trained(peft.get_peft_model(copy.deepcopy(tied_base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(tied_base), tmp_path / "theirs")
    assert_near(logits(ours), logits(theirs))
    assert not torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)
    save_adapter(ours, tmp_path / "ours")
    assert_near(logits(in_peft(tied_base, tmp_path / "ours")), logits(theirs))


@SAVED
def test_peft_trains_what_apply_lora_trains_of_a_tied_model(saved, tied_base, tmp_path):
    ours = copy.deepcopy(tied_base)
    apply_lora(ours, target_modules=["q_proj"], modules_to_save=saved, **LORA)
    assert not is_tied(ours)
    named = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    trains = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {named[name] for name in saved}
    save_adapter(trained(ours), tmp_path)
    assert_near(logits(in_peft(tied_base, tmp_path)), logits(ours))
    assert_near(logits(load_adapter(copy.deepcopy(tied_base), tmp_path)), logits(ours))
