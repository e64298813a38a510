"""Command-line options, for argparse: those that several programs have are the same in each."""

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["SHARED", "add", "names", "number"]


def names(text: str) -> list[str]:
    """Names with commas between them."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return parts


def number(kind: type, low: float, below: float = float("inf")) -> Callable[[str], float]:
    """A number of this kind in [low, below)."""

    def parse(text: str):
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"must be in [{low}, {below}), got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where kind(text) fails
    return parse


# What a flag means, and how its value looks, wherever there is one.
SHARED = {
    "--model": {"metavar": "NAME_OR_PATH", "help": "what transformers can load by name or path"},
    "--held-out": {"type": number(int, 1), "metavar": "N", "help": "examples to measure on"},
    "--train": {"type": number(int, 1), "metavar": "N", "help": "examples to train on"},
    "--output": {"type": Path, "metavar": "DIR", "help": "where the results go"},
    "--device": {
        "metavar": "DEVICE",
        "help": "cpu, cuda or cuda:N; auto is a GPU if there is one, else the CPU",
    },
    "--precision": {
        "choices": ("fp32", "bf16", "fp16"),
        "help": "of the products, in mixed precision but for fp32; fp16 needs a GPU",
    },
    "--epochs": {
        "type": number(int, 1), "metavar": "N", "help": "passes over the training examples",
    },
    "--batch-size": {
        "type": number(int, 1), "metavar": "N",
        "help": "examples of a batch on each device: two devices take 2 N at a time",
    },
    "--accumulation": {"type": number(int, 1), "metavar": "N", "help": "batches a step"},
    "--lr": {"type": number(float, 0), "metavar": "LR", "help": "peak learning rate"},
    "--warmup": {"metavar": "N", "help": "steps to the peak"},
    "--weight-decay": {"type": number(float, 0), "metavar": "D", "help": "AdamW's"},
    "--max-length": {"metavar": "N", "help": "tokens kept of a sequence"},
    "--rank": {"type": number(int, 1), "metavar": "R", "help": "r of every LoRA layer"},
    "--alpha": {
        "type": number(float, 0), "metavar": "A", "help": "updates are scaled by alpha / rank",
    },
    "--dropout": {"type": number(float, 0, 1), "metavar": "P", "help": "dropout before lora_A"},
    "--targets": {
        "type": names, "metavar": "NAME,NAME",
        "help": "the layers that get LoRA, by the ends of their names",
    },
    "--seed": {
        # numpy's bound is 2**32, and every process adds its number.
        "type": number(int, 0, 2**31), "metavar": "N",
        "help": "of new weights, batches and dropout",
    },
    "--save-every": {"type": number(int, 1), "metavar": "N", "help": "steps between checkpoints"},
    "--resume": {"action": "store_true", "help": "go on from the newest checkpoint in --output"},
}  # fmt: skip


def add(parser, flag: str, default=None, help: str | None = None, **changes) -> None:
    """Adds a flag to a parser or a group of one, as SHARED has it if it is there.

    help: in the place of that of SHARED, or behind it if it begins with a blank or a mark.
    """
    told = {**SHARED.get(flag, {}), **changes}
    if help is not None:
        told["help"] = told["help"] + help if help[0] in " ,;" else help
    if default is not None:
        told |= {"default": default, "help": f"{told['help']} (default: {default})"}
    parser.add_argument(flag, **told)
