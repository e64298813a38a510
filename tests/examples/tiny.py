"""A pretrained model in miniature: a random BERT with a WordPiece vocabulary, and sentences."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SUBJECTS = ["soup", "bread", "train", "garden", "teacher", "film", "hotel", "coat"]
WORDS = {0: ["bad", "dreary", "cold", "rude"], 1: ["good", "lovely", "warm", "kind"]}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_model(path: str, **options) -> None:
    """Saves a BERT of two layers, 64 wide, without a classification head, and its tokenizer."""
    words = [*SUBJECTS, *WORDS[0], *WORDS[1], "the", "was", "and", "very", "so", "##s", "."]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=32, initializer_range=0.1,
        hidden_dropout_prob=0.0, **options,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)


def save_sentences(path: Path) -> None:
    """Writes 200 labelled sentences whose adjectives tell the class."""
    draw = random.Random(0)
    rows = {}
    while len(rows) < 200:
        label = len(rows) % 2
        first, second = draw.sample(WORDS[label], 2)
        subjects = " and the ".join(draw.sample(SUBJECTS, draw.randint(1, 3)))
        rows[f"the {subjects} was {draw.choice(['', 'so ', 'very '])}{first} and {second} ."] = (
            label
        )
    lines = [f"{sentence}\t{label}" for sentence, label in rows.items()]
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
