"""Where LoRA goes, what trains, and the loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, DataCollatorForSeq2Seq

import lora_kernels as lora
from examples.errors import InputError
from examples.nlg import data
from examples.nlg.model import CompletionLoss, add_lora, load_model, load_tokenizer


def test_query_and_value_of_every_layer_get_lora_and_nothing_else_trains(tiny_gpt2):
    torch.manual_seed(0)
    model = add_lora(load_model(tiny_gpt2), rank=4, alpha=32, dropout=0.1)
    layers = [block.attn.c_attn for block in model.transformer.h]
    for layer in layers:
        assert isinstance(layer, lora.LoRAMergedLinear)
        assert layer.enable_lora == [True, False, True]
        assert layer.fan_in_fan_out
        assert (layer.scaling, layer.lora_dropout.p) == (8, 0.1)
    assert not torch.equal(layers[0].lora_A, layers[1].lora_A)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"transformer.h.{i}.attn.c_attn.lora_{factor}" for i in (0, 1) for factor in "AB"
    }
    # Per layer A [2·4, 32] and B [2·32, 4].
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 8 * 32


def test_adding_lora_changes_no_output_and_only_query_and_value_can_change(tiny_gpt2):
    base, model = load_model(tiny_gpt2).eval(), load_model(tiny_gpt2)
    add_lora(model, rank=4, alpha=32, dropout=0.0).eval()
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model(tokens).logits, base(tokens).logits)
    layer = model.transformer.h[0].attn.c_attn
    nn.init.normal_(layer.lora_B)
    changed = (layer.merged_weight() != base.transformer.h[0].attn.c_attn.weight).any(0)
    assert changed.view(3, 32).all(1).tolist() == [True, False, True]
    assert not changed.view(3, 32)[1].any()


def test_no_dropout_but_loras(tiny_gpt2):
    model = load_model(tiny_gpt2).train()
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_a_model_of_another_kind_is_refused(tmp_path):
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=8, vocab_size=9)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(InputError, match=r"weights of a GPT2LMHeadModel are not in it"):
        load_model(str(tmp_path))


def test_a_body_without_a_head_of_its_own_is_whole(tiny_gpt2, tmp_path):
    whole = load_model(tiny_gpt2)
    whole.transformer.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_is_not_there_is_named(load, tmp_path):
    with pytest.raises(InputError, match=f"--model {tmp_path}/none"):
        load(f"{tmp_path}/none")


# ---- the loss ----


class Fixed(nn.Module):
    """A model of two words whose logits are log 1 and log 3 everywhere: p = 1/4 and 3/4."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(1, 2, bias=False)
        self.lm_head.weight.data = torch.tensor([[0.0], [math.log(3.0)]])

    def transformer(self, tokens, **kwargs):
        return SimpleNamespace(last_hidden_state=torch.ones(*tokens.shape, 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_by_hand(smoothing):
    labels = torch.tensor([[-100, -100, 0, 1], [-100, 1, 1, -100]])
    loss = CompletionLoss(Fixed(), smoothing)
    # -log p: log 4 for word 0, log 4/3 for word 1; both weighted alike in the mean of the words.
    first, second = math.log(4), math.log(4 / 3)
    right = (first + 3 * second) / 4
    expected = (1 - smoothing) * right + smoothing * (first + second) / 2
    arguments = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4), labels
    # Half a dozen roundings to float32.
    with torch.no_grad():
        assert float(loss.train()(*arguments)) == pytest.approx(expected, rel=1e-6)
        assert float(loss.eval()(*arguments)) == pytest.approx(right, rel=1e-6)


def test_the_loss_is_that_of_the_completions_whatever_the_padding(tiny_gpt2, tokenizer):
    rows = data.encode(
        tokenizer,
        [data.Example("name : Cotto", "Cotto ."), data.Example("name : The Mill", "It serves")],
        512,
    )
    model = load_model(tiny_gpt2).double().eval()
    losses, count = 0.0, 0
    for row in rows:  # every completion alone, from all the logits
        logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                losses, count = losses - logits[position - 1, label], count + 1
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert (batch["attention_mask"] == 0).any()
    loss = CompletionLoss(model, 0.1).eval()(**batch).item()
    assert loss == pytest.approx((losses / count).item(), rel=1e-12)


def test_tokens_of_the_context_are_not_learned(tiny_gpt2, tokenizer, restaurants):
    batch = DataCollatorForSeq2Seq(tokenizer)(data.encode(tokenizer, restaurants[:1], 512))
    model = load_model(tiny_gpt2)
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape))
    CompletionLoss(model, 0.0)(**batch)
    completion = len(tokenizer(" " + restaurants[0].completion)["input_ids"]) + 1
    assert seen == [(completion, 32)]
