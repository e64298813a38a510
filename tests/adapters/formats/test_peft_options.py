"""Options of PEFT that change how an adapter trains, not what its layers compute."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.model.paths import adapted_layers
from tests.adapters.nets import Net, adapted
from tests.adapters.tied import LORA, assert_near, in_peft, is_tied, logits, trained
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
