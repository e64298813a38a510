"""Options of PEFT that change how an adapter trains, not what its layers compute."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.adapters.formats.peft import read
from lora_kernels.model.paths import adapted_layers
from tests.adapters.nets import Net, adapted
from tests.adapters.tied import LORA, assert_near, in_peft, is_tied, logits, trained
from tests.quantized import quantised
from tests.tiny_models import tiny_llama


def saved_by_peft(base, directory, **options):
    """The trained model of PEFT whose adapter is in directory then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**LORA, **options)
        model = trained(peft.get_peft_model(copy.deepcopy(base), config))
        model.save_pretrained(directory)
    return model


# ---- ensure_weight_tying ----


@pytest.mark.parametrize("tied", [True, False])
def test_ensure_weight_tying_means_nothing_if_nothing_is_tied(tied, seed, tmp_path):
    base = tiny_llama(tie_word_embeddings=tied).double().eval()
    theirs = saved_by_peft(base, tmp_path, target_modules=["q_proj"], ensure_weight_tying=True)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert_near(logits(ours), logits(theirs))
    assert is_tied(ours) == tied


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("has_lora", [True, False])
def test_ensure_weight_tying_keeps_saved_modules_tied(saved, has_lora, tied_base, tmp_path):
    theirs = saved_by_peft(
        tied_base, tmp_path / "theirs", target_modules=["q_proj"], modules_to_save=saved,
        ensure_weight_tying=True,
    )  # fmt: skip
    ours = copy.deepcopy(tied_base)
    if has_lora:
        apply_lora(ours, target_modules=["q_proj"], **LORA)
    load_adapter(ours, tmp_path / "theirs")
    assert is_tied(ours)
    assert_near(logits(ours), logits(theirs))
    trained(ours)
    save_adapter(ours, tmp_path / "ours")
    assert_near(logits(in_peft(tied_base, tmp_path / "ours")), logits(ours))


def test_ensure_weight_tying_with_other_values_on_each_side_is_refused(tied_base, tmp_path):
    saved_by_peft(
        tied_base, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="tied to"):
        load_adapter(copy.deepcopy(tied_base), tmp_path)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("has_lora", [True, False])
def test_ensure_weight_tying_of_factors_gives_both_modules_theirs(
    targets, has_lora, tied_base, tmp_path
):
    theirs = saved_by_peft(
        tied_base, tmp_path, target_modules=["q_proj", *targets], ensure_weight_tying=True
    )
    ours = copy.deepcopy(tied_base)
    if has_lora:
        apply_lora(ours, target_modules=["q_proj", "embed_tokens", "lm_head"], **LORA)
    with pytest.warns(UserWarning, match=r"lm_head .* train by themselves"):
        load_adapter(ours, tmp_path)
    assert_near(logits(ours), logits(theirs))
    assert torch.equal(ours.lm_head.lora_A, ours.model.embed_tokens.lora_B.T)


# ---- MiCA ----


def test_mica_loads_and_leaves_lora_b_frozen(seed, tmp_path):
    base, ids = Net(), torch.randint(0, 11, (4, 5))
    theirs = saved_by_peft(
        base, tmp_path, target_modules=["lin", "embed"], init_lora_weights="mica"
    )
    assert torch.equal(theirs.base_model.model.lin.base_layer.weight, base.lin.weight)
    ours = load_adapter(copy.deepcopy(base).eval(), tmp_path)
    torch.testing.assert_close(ours(ids), theirs(ids))
    for layer in adapted_layers(ours).values():
        assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (True, False)
    again = load_adapter(adapted(base, r=2, target_modules=["lin", "embed"]).eval(), tmp_path)
    torch.testing.assert_close(again(ids), theirs(ids))


# ---- the same gradients ----


def gradients(model, ids):
    """Of all that trains, by the names of PEFT's files."""
    model.zero_grad()
    model(ids).square().sum().backward()
    names = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain = {n.replace("base_model.model.", "").replace(".default", ""): names[n] for n in names}
    return {n if n.endswith("bias") else n.removesuffix(".weight"): g for n, g in plain.items()}


def assert_same_gradients(ours, theirs, ids):
    actual, expected = gradients(ours, ids), gradients(theirs, ids)
    for name in list(actual):  # the bias is its own plus scaling·lora_B.bias
        if name.endswith(".bias"):
            actual[name.replace(".bias", ".lora_B.bias")] = actual.pop(name) * ours.lin.scaling
    assert actual.keys() == expected.keys()
    for name in actual:
        size = expected[name].abs().max()
        assert_near(actual[name] / size, expected[name] / size)


VARIANTS = {
    "lora_bias": {"lora_bias": True},
    "MiCA": {"init_lora_weights": "mica"},
    "BD-LoRA": {"use_bdlora": peft.BdLoraConfig(target_modules_bd_b=["lin"], nblocks=2)},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_all_that_trains_are_pefts(options, seed, tmp_path):
    base, ids = Net(), torch.randint(0, 11, (4, 5))
    theirs = saved_by_peft(base, tmp_path, target_modules=["lin"], **options).double()
    ours = load_adapter(base.double().eval(), tmp_path).double()
    assert_near(ours(ids), theirs(ids))
    assert_same_gradients(ours, theirs, ids)


# ---- lora_bias ----


def test_lora_bias_adds_to_the_biases_and_trains_with_them(seed, tmp_path):
    base, ids = Net().double(), torch.randint(0, 11, (4, 5))
    theirs = saved_by_peft(
        base, tmp_path / "theirs", target_modules=["lin", "mix", "conv2"], lora_bias=True
    )
    ours = load_adapter(copy.deepcopy(base).eval(), tmp_path / "theirs")
    assert_near(ours(ids), theirs(ids))
    layers = adapted_layers(ours)
    assert all(layer.bias.requires_grad for layer in layers.values() if hasattr(layer, "bias"))
    save_adapter(trained(ours), tmp_path / "ours")
    again = load_adapter(copy.deepcopy(base).eval(), tmp_path / "ours")
    assert_near(again(ids), ours(ids))
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_near(opened(ids), ours(ids))


def test_lora_bias_over_biases_of_the_adapter_adds_to_those(seed, tmp_path):
    base, ids = Net().double(), torch.randint(0, 11, (4, 5))
    theirs = saved_by_peft(base, tmp_path, target_modules=["lin"], lora_bias=True, bias="lora_only")
    ours = load_adapter(copy.deepcopy(base).eval(), tmp_path)
    assert_near(ours(ids), theirs(ids))


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda net: setattr(net, "lin", nn.Linear(8, 8, bias=False)), {}, "lin has no bias"),
        (lambda net: apply_lora(net, target_modules=["lin"], **LORA), {}, "a plain model"),
        (lambda net: None, {"adapter": "one"}, "without a name"),
    ],
)
def test_lora_bias_that_has_no_place_is_refused(change, arguments, words, seed, tmp_path):
    saved_by_peft(Net(), tmp_path, target_modules=["lin"], lora_bias=True)
    net = Net()
    change(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"lora_bias: .*{words}"):
        load_adapter(net, tmp_path, **arguments)
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.zeros(7), r"shape must be \[8\]"), (torch.zeros(8, dtype=torch.int64), "floating")],
)
def test_lora_bias_that_does_not_fit_is_refused(value, words, seed, tmp_path):
    saved_by_peft(Net(), tmp_path, target_modules=["lin"], lora_bias=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lin.lora_B.bias": value}, file)
    with pytest.raises(ValueError, match=f"lora_B.bias: .*{words}"):
        load_adapter(Net(), tmp_path)


def test_lora_bias_is_not_converted_without_its_model(seed, tmp_path):
    saved_by_peft(Net(), tmp_path, target_modules=["lin"], lora_bias=True)
    with pytest.raises(ValueError, match=r"lora_bias: .* load_adapter"):
        read(tmp_path)


# ---- BD-LoRA ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"classifier": 6}}])
def test_bdlora_with_b_in_blocks_becomes_a_merged_linear(options, seed, tmp_path):
    base, ids = Net().double(), torch.randint(0, 11, (4, 5))
    blocks = peft.BdLoraConfig(target_modules_bd_b=["lin"], nblocks=2, match_strict=False)
    theirs = saved_by_peft(
        base,
        tmp_path / "theirs",
        target_modules=["lin", "classifier"],
        use_bdlora=blocks,
        **options,
    )
    ours = load_adapter(copy.deepcopy(base).eval(), tmp_path / "theirs")
    assert_near(ours(ids), theirs(ids))
    kept = theirs.base_model.model.lin.lora_B["default"].weight
    assert torch.equal(ours.lin.lora_B, kept)
    assert ours.lin.enable_lora == [True, True]
    save_adapter(trained(ours), tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_near(opened(ids), ours(ids))


def test_bdlora_with_b_in_blocks_over_a_quantised_layer_is_refused(seed, tmp_path):
    base, blocks = Net(), peft.BdLoraConfig(target_modules_bd_b=["lin"], nblocks=2)
    saved_by_peft(base, tmp_path, target_modules=["lin"], use_bdlora=blocks)
    base.lin = quantised("int8", 8, 8)
    with pytest.raises(ValueError, match="one group for a quantised Linear8bitLt, got 2"):
        load_adapter(base, tmp_path)


def test_bdlora_with_a_in_blocks_is_refused(seed, tmp_path):
    blocks = peft.BdLoraConfig(target_modules_bd_a=["lin"], nblocks=2)
    saved_by_peft(Net(), tmp_path, target_modules=["lin"], use_bdlora=blocks)
    with pytest.raises(ValueError, match="use_bdlora: lora_A of 'lin' is in blocks"):
        load_adapter(Net(), tmp_path)


# ---- VeLoRA ----


def test_velora_becomes_lora(seed, tmp_path):
    base, ids = Net().double(), torch.randint(0, 11, (4, 5))
    theirs = saved_by_peft(
        base, tmp_path, target_modules=["lin"], velora_config=peft.VeloraConfig(num_groups=4)
    )
    ours = load_adapter(copy.deepcopy(base).eval(), tmp_path)
    assert_near(ours(ids), theirs(ids))


# ---- KaSA ----


def test_kasa_is_refused_because_it_truncates_the_base(seed, tmp_path):
    saved_by_peft(Net(), tmp_path, target_modules=["lin"], kasa_config=peft.KasaConfig())
    with pytest.raises(ValueError, match="kasa_config: only an adapter that keeps the base"):
        load_adapter(Net(), tmp_path)


# ---- AutoPeftModel ----


@pytest.mark.parametrize("auto", [peft.AutoPeftModel, peft.AutoPeftModelForCausalLM])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile])
def test_auto_classes_of_peft_open_what_is_saved_here(auto, wrap, seed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    trained(apply_lora(model, target_modules=["q_proj"], **LORA))
    save_adapter(wrap(model), tmp_path / "adapter")
    theirs = auto.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model))


def test_class_of_a_model_is_told_by_the_name_that_imports_it(seed, tmp_path):
    model = apply_lora(tiny_llama(), target_modules=["q_proj"], **LORA)
    model.__class__ = type("FSDPLlama", (type(model),), {})  # as fully_shard does
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
