"""modules_to_save of a model that ties its head to its embedding: untied, as PEFT's copies are."""

import copy

import peft
import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, load_adapter, mark_only_lora_as_trainable, save_adapter
from tests.tiny_models import randomise, tiny_llama

SAVED = pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=" ".join
)
LORA = {"r": 2, "lora_alpha": 6}


@pytest.fixture
def base(seed, device):
    model = randomise(tiny_llama(tie_word_embeddings=True)).double().to(device).eval()
    assert is_tied(model)
    return model


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


def trained(model):
    """Everything that trains moves, each parameter by itself."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def logits(model):
    ids = torch.arange(14, device=next(model.parameters()).device).view(2, 7) % 13
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_peft(base, directory):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # of numbers near one


@SAVED
def test_peft_adapters_travel_both_ways(saved, base, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved, **LORA)
    theirs = trained(peft.get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same(logits(ours), logits(theirs))
    assert not torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)
    save_adapter(ours, tmp_path / "ours")
    assert_same(logits(in_peft(base, tmp_path / "ours")), logits(theirs))


@SAVED
def test_apply_lora_trains_what_peft_trains(saved, base, tmp_path):
    ours = copy.deepcopy(base)
    apply_lora(ours, target_modules=["q_proj"], modules_to_save=saved, **LORA)
    assert not is_tied(ours)
    named = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    trains = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {named[name] for name in saved}
    save_adapter(trained(ours), tmp_path)
    assert_same(logits(in_peft(base, tmp_path)), logits(ours))
    assert_same(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(ours))


@SAVED
def test_a_model_that_trains_tied_saves_both_sides(saved, base, tmp_path):
    ours = apply_lora(copy.deepcopy(base), target_modules=["q_proj"], **LORA)
    mark_only_lora_as_trainable(ours, modules_to_save=saved)
    save_adapter(trained(ours), tmp_path)
    assert is_tied(ours)
    assert_same(logits(in_peft(base, tmp_path)), logits(ours))
    assert_same(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(ours))
    tied = apply_lora(copy.deepcopy(base), target_modules=["q_proj"], **LORA)
    assert_same(logits(load_adapter(tied, tmp_path).eval()), logits(ours))


@SAVED
def test_what_a_tied_model_cannot_hold_is_refused(saved, base, tmp_path):
    ours = copy.deepcopy(base)
    apply_lora(ours, target_modules=["q_proj"], modules_to_save=saved, **LORA)
    save_adapter(trained(ours), tmp_path)
    tied = apply_lora(copy.deepcopy(base), target_modules=["q_proj"], **LORA)
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .* to which the model ties"):
        load_adapter(tied, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in tied.state_dict().items())


def test_ties_within_a_saved_module_stay(seed):
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": head, "other": nn.Linear(4, 4)})
    model["other"].bias = head[0].bias
    apply_lora(model, r=1, lora_alpha=1, target_modules=["body"], modules_to_save=["head"])
    assert head[1].weight is head[0].weight
    assert head[0].bias is not model["other"].bias
    assert torch.equal(head[0].bias, model["other"].bias)
    assert not model["other"].bias.requires_grad
