"""Command line of the text generation example; see ``python -m examples.nlg --help``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from examples import runs
from examples.devices import is_cpu, see_only
from examples.errors import InputError, resuming, until_interrupted
from examples.nlg import data
from examples.options import add, number
from examples.progress import epoch_line
from examples.record import content_hash

ADAPTER = "adapter"
MODEL = "medium"
LR_BELOW = 1e37  # AdamW's first step divides it by 1 - β₁ = 0.1 and has to stay in float32
MADE_OF = ("model", "task", "rank", "alpha", "dropout", "max_length")  # and train's Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0, 1 where a check of the result failed, 2 where the input is at fault."""
    options = _parser().parse_args(argv)
    try:
        if hasattr(options, "device"):
            see_only(options.device)
        return options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# ---- the commands; what takes seconds to import is imported where it is needed ----


def train(options: argparse.Namespace) -> int:
    """Adapts a model to a task; writes an adapter after every epoch."""
    examples = data.load(options.task, options.data, options.split)
    source = options.validation_data
    held = data.load(options.task, source, options.validation_split) if source else []
    import torch
    from tqdm import tqdm

    import lora_kernels as lora
    from examples.nlg.checkpoints import CHECKPOINTS, check_fresh
    from examples.nlg.model import add_lora, load_model, load_tokenizer
    from examples.nlg.train import Progress, Settings, mean_loss
    from examples.nlg.train import train as run

    ended = check_fresh(options.output, options.resume)
    tokenizer = load_tokenizer(options.model)
    features = _encode(tokenizer, examples, options.data, options.max_length)
    held_features = _encode(tokenizer, held, source, options.max_length) if held else []
    model = load_model(options.model)
    _check_positions(model, options.max_length)
    _check_writable(options.output, options.output / runs.RESULTS)
    torch.manual_seed(options.seed)
    add_lora(model, options.rank, options.alpha, options.dropout)
    progress = Progress()

    def after_epoch(done: int) -> None:
        lora.save_adapter(model, options.output / f"epoch-{done}")
        lora.save_adapter(model, options.output / ADAPTER)
        if held_features:
            loss = mean_loss(model, tokenizer, held_features)
            progress.held_out.append((progress.step, loss))
        told = _told(progress, done, source)
        line = epoch_line(done, options.epochs, progress.seconds / done, told)
        tqdm.write(line)  # beside the bar
        sys.stdout.flush()

    made_of = {name: getattr(options, name) for name in MADE_OF}
    settings = {name: getattr(options, name) for name in Settings.__dataclass_fields__}
    on_cpu = is_cpu(options.device)
    record = {
        **made_of,
        "data": options.data,
        "validation_data": source,
        "data_hash": content_hash([[vars(row) for row in rows] for rows in (examples, held)]),
        "device": "cpu" if on_cpu else torch.accelerator.current_accelerator().type,
        **settings,
        "precision": options.precision,
        "examples": len(features),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": runs.versions(),
    }
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of a launcher

    def writes() -> bool:  # of a run that was refused, or has ended, nothing
        return is_first and progress.has_begun and not ended

    with runs.reported(options.output / runs.RESULTS, record, writes) as results:
        try:
            run(
                model,
                tokenizer,
                features,
                Settings(**settings),
                made_of=made_of,
                progress=progress,
                precision=options.precision,
                cpu=on_cpu,
                checkpoints=options.output / CHECKPOINTS,
                save_every=options.save_every,
                resume=options.resume,
                after_epoch=after_epoch,
            )
        finally:
            reached = progress.state_dict()
            results |= {"steps": progress.step}
            results |= {name: reached[name] for name in ("tokens", "seconds", "losses", "held_out")}
        results["tokens_per_second"] = progress.tokens / progress.seconds
    if is_first:
        if ended:
            print("resume: the run has ended")
            told = _told(progress, options.epochs, source)
            print(epoch_line(options.epochs, options.epochs, 0.0, told))
        _draw(options, progress)
        print(f"adapter: {options.output / ADAPTER}, results: {options.output / runs.RESULTS}")
    return 0


def _told(progress, epochs: int, source: str | None) -> dict[str, str]:
    """The training loss of the last of these epochs, and behind it the one on source."""
    recent = [float(loss) for loss in progress.losses[-(progress.step // epochs) :]]
    told = {"loss": f"{sum(recent) / len(recent):.4f}"}
    if progress.held_out:
        told[f"loss on {source}"] = f"{progress.held_out[-1][1]:.4f}"
    return told


def _draw(options: argparse.Namespace, progress) -> None:
    from examples.plots import curves

    # Of the training loss alone.
    parts = {"label smoothing": options.label_smoothing, "dropout": options.dropout}
    used = " and ".join(name for name, value in parts.items() if value)
    curves(
        options.output / "curves.png",
        f"{Path(options.model).name} on {options.task}, LoRA of rank {options.rank}",
        {"training": list(enumerate(progress.losses, start=1))},
        "nats a predicted token" + (f",\nwith {used}" if used else ""),
        {"held out": progress.held_out},
        "held-out loss\n(nats a predicted token" + (f",\nwithout {used})" if used else ")"),
    )


def decode(options: argparse.Namespace) -> int:
    """Loads an adapter onto its base model and writes predictions."""
    groups = data.group(data.load(options.task, options.data, options.split))
    import torch

    import lora_kernels as lora
    from examples.nlg import decode as decoding
    from examples.nlg.model import base_of, load_model, load_tokenizer

    names = decoding.Search.__dataclass_fields__
    search = decoding.Search(**{name: getattr(options, name) for name in names})
    told = None if options.model or options.adapter is None else base_of(options.adapter)
    base = options.model or told or MODEL
    try:
        tokenizer, model = load_tokenizer(base), load_model(base)
    except InputError as error:
        whose = f"; --adapter {options.adapter} names this model: --model takes another"
        raise InputError(f"{error}{whose if told else ''}") from None
    _check_positions(model, options.max_length)
    _check_writable(options.output, options.output)
    if options.adapter is not None:
        try:
            lora.load_adapter(model, options.adapter, merge_weights=True)
        except (OSError, ValueError) as error:
            raise InputError(f"--adapter {options.adapter}: {error}") from None
    on_cpu = is_cpu(options.device)
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator()
    model.to(device).eval()  # merged by eval()
    predictions = decoding.decode(model, tokenizer, groups, search)
    decoding.write_predictions(options.output, groups, predictions)
    print(f"{len(groups):,} predictions in {options.output}")
    return 0


def score(options: argparse.Namespace) -> int:
    """Prints the metrics of the task for a file of predictions, and writes them as JSON."""
    from examples.nlg.decode import read_predictions
    from examples.nlg.metrics import Missing
    from examples.nlg.metrics import score as measure

    groups, predictions = read_predictions(options.predictions, options.task == "webnlg")
    results = measure(options.task, groups, predictions)
    for part, scores in results.items():
        for name, value in scores.items():
            told = f"missing: {value.reason}" if isinstance(value, Missing) else f"{value:.4f}"
            print(f"{part:<8}{name:<10}{told}")
    plain = {
        part: {
            name: {"missing": value.reason} if isinstance(value, Missing) else value
            for name, value in scores.items()
        }
        for part, scores in results.items()
    }
    runs.write_json(plain, options.output or options.predictions.with_suffix(".scores.json"))
    return 0


def demo(options: argparse.Namespace) -> int:
    """The whole way on a small model that is pretrained first."""
    examples = data.load("e2e", options.data)
    from examples.nlg.demo import run

    return run(options, examples)


def _encode(tokenizer, examples: list[data.Example], source: str, max_length: int) -> list[dict]:
    features = data.encode(tokenizer, examples, max_length)
    if not features:
        raise InputError(f"{source}: no context is shorter than --max-length {max_length}")
    return features


def _check_positions(model, max_length: int) -> None:
    if max_length > model.config.n_positions:
        raise InputError(
            f"--max-length {max_length}: the model has {model.config.n_positions} positions"
        )


def _check_writable(output: Path, file: Path) -> None:
    """Now, not after hours of work."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error}") from None
    if file.is_dir():
        raise InputError(f"--output {output}: {file} is a directory")


# ---- options ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nlg",
        description="GPT-2 with LoRA on E2E, DART and WebNLG: train, decode, score; or a small "
        "demonstration of all three.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable) -> Callable:
        added = commands.add_parser(
            function.__name__, help=function.__doc__, description=function.__doc__
        )
        added.set_defaults(command=function)

        return partial(add, added)

    def sources(option: Callable, split: str) -> None:
        option("--task", None, "whose format and metrics", choices=data.TASKS, required=True)
        option(
            "--data", None, "a file of the task's authors, or NAME or NAME:CONFIG on the hub",
            required=True, metavar="PATH_OR_NAME",
        )  # fmt: skip
        option("--split", split, "which part of a data set of the hub", metavar="NAME")

    def model(option: Callable, default: str | None = MODEL, more: str = "") -> None:
        option("--model", default, f"GPT-2 small, medium or large, or another name or path{more}")
        option("--max-length", 512, type=number(int, 2))
        option("--device", "auto")

    option = command(train)
    sources(option, "train")
    model(option)
    option(
        "--validation-data", None, "held-out data, to measure the loss on after each epoch",
        metavar="PATH_OR_NAME",
    )  # fmt: skip
    option("--validation-split", "validation", "which part of it, on the hub", metavar="NAME")
    option("--output", Path("runs/nlg"))
    option("--rank", 4)
    option("--alpha", 32.0)
    option("--dropout", 0.1)
    option("--epochs", 5)
    option("--batch-size", 8)
    option("--accumulation", 1)
    option("--lr", 2e-4, type=number(float, 0, LR_BELOW))
    option("--warmup", 500, type=number(int, 0))
    option("--weight-decay", 0.01)
    option("--label-smoothing", 0.1, "ε", type=number(float, 0, 1), metavar="E")
    option("--seed", 0)
    option("--precision", "fp32")
    option("--save-every", 100)
    option("--resume")

    option = command(decode)
    sources(option, "test")
    model(option, None, f" (default: the one that --adapter names, else {MODEL})")
    option("--adapter", None, "what train wrote; without it the base decodes", metavar="DIR")
    option(
        "--output", Path("runs/nlg/predictions.jsonl"), "a line for each context",
        metavar="FILE.jsonl",
    )  # fmt: skip
    option("--beams", 10, "width of the beam", type=number(int, 1), metavar="N")
    option("--length-penalty", 0.8, "exponent of the length", type=float, metavar="P")
    option(
        "--no-repeat-ngram", 4, "n-grams of this size come once in a completion; 0: any",
        type=number(int, 0), metavar="N",
    )  # fmt: skip
    option("--new-tokens", 64, "at most", type=number(int, 1), metavar="N")
    option("--batch-size", 16, "contexts a batch")

    option = command(score)
    option("--task", None, "whose metrics", choices=data.TASKS, required=True)
    option("predictions", None, "what decode wrote", type=Path, metavar="FILE.jsonl")
    option("--output", None, "default: beside it, .scores.json", metavar="FILE.json")

    option = command(demo)
    option("--data", None, "an E2E file", required=True, type=Path, metavar="FILE.txt")
    option(
        "--vocabulary", "gpt2", "the tokenizer of this model, or a folder with its vocab.json and "
        "merges.txt", metavar="NAME_OR_DIR",
    )  # fmt: skip
    option("--output", Path("runs/nlg-demo"))
    option("--device", "auto")
    return parser


if __name__ == "__main__":
    trains = sys.argv[1:2] == ["train"]
    what_now = resuming("examples.nlg") if trains else "nothing was kept: start it again"
    sys.exit(until_interrupted(main, what_now))
