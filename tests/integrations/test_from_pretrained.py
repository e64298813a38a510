"""LoRA layers in a PreTrainedModel that from_pretrained makes on the meta device."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

import lora_kernels as lora

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
CONFIG = BertConfig(num_attention_heads=2, **SIZES)
LAYERS = {
    "linear": lambda: lora.Linear(16, 16, r=4, lora_alpha=8),
    "merged_linear": lambda: lora.MergedLinear(16, 48, r=2, enable_lora=[True, False, True]),
    "embedding": lambda: lora.Embedding(8, 16, r=2),
    "conv": lambda: lora.Conv1d(4, 4, 3, r=2),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


class Tagger(BertPreTrainedModel):
    def __init__(self, config, kind):
        super().__init__(config)
        self.bert, self.head = BertModel(config), LAYERS[kind]()
        self.post_init()


def draws(layer):
    """Whether the factors are as the constructor draws them."""
    zero, drawn = layer.lora_B, layer.lora_A
    if isinstance(layer, lora.Embedding):
        zero, drawn = drawn, zero
    return not zero.any() and bool(drawn.any()) and bool(drawn.isfinite().all())


@every_layer
def test_factors_that_no_file_holds_are_drawn(kind, seed, tmp_path, monkeypatch):
    BertModel(CONFIG).save_pretrained(tmp_path)
    empty_like = torch.empty_like

    def junk(*args, **kwargs):
        """What fresh memory may hold."""
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", junk)
    model = Tagger.from_pretrained(tmp_path, kind=kind)
    assert draws(model.head)


@every_layer
def test_factors_in_the_file_are_loaded(kind, seed, tmp_path):
    model = Tagger(CONFIG, kind)
    for name in ("lora_A", "lora_B"):
        nn.init.normal_(getattr(model.head, name))
    model.save_pretrained(tmp_path)
    again = Tagger.from_pretrained(tmp_path, kind=kind)
    for name, value in model.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], value), name


def test_a_trained_layer_in_a_new_model_keeps_its_factors(seed):
    model = Tagger(CONFIG, "linear")
    nn.init.normal_(model.head.lora_B)
    before = model.head.lora_B.clone()
    model.head._is_hf_initialized = False
    model.post_init()
    assert torch.equal(model.head.lora_B, before)


def test_a_layer_that_left_the_meta_device_by_to_empty_keeps_its_factors(seed):
    with torch.device("meta"):
        head = LAYERS["linear"]()
    head.to_empty(device="cpu").reset_parameters()
    nn.init.normal_(head.lora_B)
    model = Tagger(CONFIG, "linear")
    model.head, before = head, head.lora_B.clone()
    model.post_init()
    assert torch.equal(head.lora_B, before)
