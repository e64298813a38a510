"""GPT-2 in miniature with a byte-pair vocabulary of its own, restaurants to describe, real data."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from examples.nlg.data import Example
from examples.nlg.model import load_tokenizer

REPOSITORY = Path(__file__).parents[3]
SHARED_DATA = Path(os.environ.get("LORA_KERNELS_DATA", REPOSITORY.parent / "shared" / "data"))

NAMES = ["The Eagle", "Cotto", "Café Rouge", "The Mill"]
FOODS = ["English", "Thai", "French"]
AREAS = ["city centre", "riverside"]


@pytest.fixture(scope="session")
def real_data():
    """real_data(path): a file of the public data sets; skips the test where it is not there."""

    def locate(path: str) -> Path:
        if not (SHARED_DATA / path).exists():
            pytest.skip(f"no {path} under LORA_KERNELS_DATA or ../shared/data")
        return SHARED_DATA / path

    return locate


@pytest.fixture(scope="session")
def restaurants() -> list[Example]:
    """24 contexts of two texts each."""
    return [
        Example(f"name : {name} | food : {food} | area : {area}", text)
        for name, food, area in itertools.product(NAMES, FOODS, AREAS)
        for text in (
            f"{name} serves {food} food in the {area} .",
            f"In the {area} , {name} has {food} food .",
        )
    ]


@pytest.fixture(scope="session")
def e2e_file(restaurants, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "train.txt"
    lines = [f"{example.context}||{example.completion} \n" for example in restaurants]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_gpt2(restaurants, tmp_path_factory) -> str:
    """Path of a random GPT-2 of two layers, 32 wide, with vocab.json and merges.txt."""
    path = str(tmp_path_factory.mktemp("tiny-gpt2"))
    tokenizer = ByteLevelBPETokenizer()
    texts = [f"{example.context} {example.completion}" for example in restaurants]
    tokenizer.train_from_iterator(texts, vocab_size=330, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=2, n_head=2, n_positions=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_gpt2):
    return load_tokenizer(tiny_gpt2)
