"""A model that ties its head to its embedding."""

import copy

import peft
import pytest
import torch

from tests.tiny_models import randomise, tiny_llama

SAVED = pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=" ".join
)
LORA = {"r": 2, "lora_alpha": 6}


def tied_llama():
    return randomise(tiny_llama(tie_word_embeddings=True)).double().eval()


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


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # of numbers near one
