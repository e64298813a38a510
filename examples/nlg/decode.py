"""Beam search over contexts, and predictions with their references as lines of JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from examples.errors import InputError
from examples.nlg.data import Group, read_text

__all__ = ["Search", "decode", "read_predictions", "write_predictions"]

PARAGRAPH = "\n\n"  # one token of GPT-2; like end-of-text it ends a completion


@dataclass(frozen=True)
class Search:
    """Beam search; the defaults are those of the original's commands.

    Raises: InputError where new_tokens leave no room for a context in max_length.
    """

    beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram: int = 4
    new_tokens: int = 64
    max_length: int = 512
    batch_size: int = 16

    def __post_init__(self):
        if self.max_length <= self.new_tokens:
            raise InputError(
                f"--max-length {self.max_length}: must be more than --new-tokens {self.new_tokens}"
            )


@torch.no_grad()
def decode(model, tokenizer, groups: Sequence[Group], search: Search) -> list[str]:
    """The best completion of each context, in the order of groups; model in eval mode.

    Batches hold contexts of like length, padded on the left, as generate needs them.
    """
    ends = [tokenizer.eos_token_id, *tokenizer(PARAGRAPH)["input_ids"]]
    keep = search.max_length - search.new_tokens
    prompts = [
        [*tokenizer(item.context)["input_ids"], tokenizer.eos_token_id][-keep:] for item in groups
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), unit="context", desc="decoding") as progress:
        for start in range(0, len(order), search.batch_size):
            batch = order[start : start + search.batch_size]
            padded = tokenizer.pad(
                {"input_ids": [prompts[i] for i in batch]},
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            width = padded["input_ids"].shape[1]
            tokens = model.generate(
                **padded,
                num_beams=search.beams,
                do_sample=False,
                length_penalty=search.length_penalty,
                max_new_tokens=search.new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=_no_repeat(search.no_repeat_ngram, width),
            )[:, width:]
            for i, row in zip(batch, tokens, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = text.split(PARAGRAPH)[0].strip()
            progress.update(len(batch))
    return texts


class _NoRepeatInCompletion(LogitsProcessor):
    """Bans n-grams of the completion from coming again; those of the context may be copied.

    generate's own no_repeat_ngram_size counts the context in, and so forbids names of n tokens.
    """

    def __init__(self, size: int, width: int):
        self.ban, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids, scores):
        return self.ban(input_ids[:, self.width :], scores)


def _no_repeat(size: int, width: int) -> LogitsProcessorList:
    return LogitsProcessorList([_NoRepeatInCompletion(size, width)] if size else [])


def write_predictions(path: Path, groups: Sequence[Group], predictions: Sequence[str]) -> None:
    """A line of JSON per context: context, prediction, references, category."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item, prediction in zip(groups, predictions, strict=True):
            row = asdict(item) | {"prediction": prediction}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_predictions(path: Path, categories: bool = False) -> tuple[list[Group], list[str]]:
    """What write_predictions wrote; with categories, every line has one.

    Raises: InputError that names the line.
    """
    groups, predictions = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prediction, references = row["prediction"], tuple(row["references"])
            if not references or not all(isinstance(t, str) and t.strip() for t in references):
                raise ValueError(f"references must be texts, none blank, got {references!r}")
            if not isinstance(prediction, str):
                raise ValueError(f"prediction must be a text, got {prediction!r}")
            category = row.get("category")
            if categories and not (isinstance(category, str) and category.strip()):
                raise ValueError(f"category must be a text, not blank, got {category!r}")
            groups.append(Group(row["context"], references, category))
            predictions.append(prediction)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}:{number}: {type(error).__name__}: {error}") from None
    if not groups:
        raise InputError(f"{path}: no predictions in it")
    return groups, predictions
