"""GPT-2 from transformers, LoRA on the query and value columns of its attention, its loss."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer
from transformers.utils import find_adapter_config_file

import lora_kernels as lora
from examples.errors import InputError
from examples.pretrained import from_pretrained, whole_model

__all__ = ["CompletionLoss", "add_lora", "base_of", "load_model", "load_tokenizer"]

SIZES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
# The original trains without the dropout that transformers' GPT-2 has outside of LoRA.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def load_tokenizer(name_or_path: str, flag: str = "--model"):
    """GPT-2's byte-pair tokenizer, of a model or of a folder with vocab.json and merges.txt.

    flag: the option that errors name.
    """
    location = SIZES.get(name_or_path, name_or_path)
    own_files = (Path(location) / "vocab.json").is_file()
    bare = own_files and not (Path(location) / "tokenizer_config.json").is_file()
    tokenizer = from_pretrained(GPT2Tokenizer if bare else AutoTokenizer, location, flag)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {name_or_path}: its tokenizer has no end-of-text token")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name_or_path: str) -> GPT2LMHeadModel:
    """GPT-2 small, medium, large, or of another name or path, in float32 without dropout.

    Raises: InputError for what lacks a weight of it.
    """
    return whole_model(GPT2LMHeadModel, SIZES.get(name_or_path, name_or_path), **NO_DROPOUT)


def base_of(adapter: str) -> str | None:
    """The base model that the config of an adapter names; None if there is no such name."""
    place = Path(adapter).parent if Path(adapter).is_file() else adapter
    try:
        config = find_adapter_config_file(str(place))
        told = {} if config is None else json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # load_adapter says what is wrong
        return None
    name = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    return name if isinstance(name, str) and name else None


def add_lora(model: GPT2LMHeadModel, rank: int, alpha: float, dropout: float) -> GPT2LMHeadModel:
    """LoRA on query and value of every c_attn, which alone train; returns model.

    c_attn holds query, key and value in one weight [in, 3·in]; each layer draws its own lora_A.
    """
    for block in model.transformer.h:
        block.attn.c_attn = lora.LoRAMergedLinear.from_linear(
            block.attn.c_attn,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
        )
    lora.mark_only_lora_as_trainable(model)
    return model


class CompletionLoss(nn.Module):
    """Mean over the predicted tokens of (1 - ε)·(-log p_t) + ε·mean_v(-log p_v).

    input_ids, attention_mask, labels [batch, length] -> scalar; labels -100 are not predicted.
    p: softmax over the vocabulary of the token before; ε: label_smoothing, in training mode.
    """

    def __init__(self, model: GPT2LMHeadModel, label_smoothing: float):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.transformer(
            input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # [batch, length, width]
        targets = labels[:, 1:]
        predicted = targets != -100
        # The vocabulary is the widest product: not for tokens that no one is asked to predict.
        logits = self.model.lm_head(hidden[:, :-1][predicted])  # [predicted, vocabulary]
        smoothing = self.label_smoothing if self.training else 0.0
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, targets[predicted], label_smoothing=smoothing)
