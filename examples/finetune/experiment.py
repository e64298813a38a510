"""The run itself: load, measure, train, measure, save, reload, check, report."""

import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import lora_kernels as lora
from examples import plots, runs
from examples.errors import InputError
from examples.finetune import checkpoint, ranks, report
from examples.finetune.checkpoint import CHECKPOINT
from examples.finetune.data import Example
from examples.finetune.model import add_lora, load_model, load_tokenizer, locate, set_merging
from examples.finetune.train import Arm, Settings, accuracy, encode, predict, train
from examples.progress import epoch_line
from examples.record import content_hash

__all__ = ["run"]

# Merging rounds each weight once more: a few float32 steps per layer on logits of this size.
MERGE_TOLERANCE = 1e-4
ADAPTER = "adapter"
LEFT = (CHECKPOINT, ADAPTER)  # what a run is known by
SETTINGS = (
    "rank", "alpha", "dropout", "targets", "epochs", "batch_size", "lr", "max_length", "seed",
)  # fmt: skip


def run(options: Namespace, training: Sequence[Example], held_out: Sequence[Example]) -> int:
    """Carries out what options ask for; 0, or 1 where the result cannot be trusted.

    Under torchrun all ranks train; the first one measures, checks and reports.
    """
    device = _device(options.device)
    with ranks.process_group(device):
        return _run(options, training, held_out, device)


def _run(
    options: Namespace,
    training: Sequence[Example],
    held_out: Sequence[Example],
    device: torch.device,
) -> int:
    output = runs.made(options.output)
    record = _record(options, training, held_out, device)
    left = [file for name in LEFT if (file := output / name).exists()]
    goes_on = runs.check(output, record, left, options.resume)
    if goes_on and (ended := runs.has_ended(output)):
        _say("resume", "the run has ended")
        _say("accuracy after", report.per_cent(ended["accuracy_after"]))
        _say("results", output / runs.RESULTS)
        return 0
    if ranks.is_first():
        runs.write_json(record, output / runs.RECORD)
    told = {**record, "versions": runs.versions()}
    with runs.reported(output / runs.RESULTS, told, ranks.is_first) as results:
        trusted = _carry_out(options, training, held_out, device, output, results)
        if not trusted:
            results["status"] = "failed"
    if ranks.is_first():
        (output / CHECKPOINT).unlink(missing_ok=True)
    return 0 if trusted else 1


def _record(
    options: Namespace,
    training: Sequence[Example],
    held_out: Sequence[Example],
    device: torch.device,
) -> dict:
    """What decides the outcome of a run."""
    return {
        "model": options.model,
        "data": str(options.data),
        "data_hash": content_hash([training, held_out]),
        "device": device.type,
        "processes": ranks.count(),
        **{name: getattr(options, name) for name in SETTINGS},
        "compare_peft": options.compare_peft,
        "training_examples": len(training),
        "held_out_examples": len(held_out),
    }


def _carry_out(
    options: Namespace,
    training: Sequence[Example],
    held_out: Sequence[Example],
    device: torch.device,
    output: Path,
    results: dict,
) -> bool:
    """All of a run; puts what it finds into results, and says whether that can be trusted."""
    location = locate(options.model)
    tokenizer = load_tokenizer(location)
    classes = sorted({example.label for example in (*training, *held_out)})
    max_length = min(options.max_length, tokenizer.model_max_length)
    train_features = encode(tokenizer, training, classes, max_length)
    held_features = encode(tokenizer, held_out, classes, max_length)

    def plain_model(seed: int) -> nn.Module:
        return load_model(location, len(classes), tokenizer, seed)

    model = plain_model(options.seed)
    add_lora(model, options.rank, options.alpha, options.dropout, options.targets).to(device)
    settings = Settings(options.epochs, options.batch_size, options.lr, options.seed)
    steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
    arms = [Arm("lora_kernels", model, tokenizer, settings, steps)]
    if options.compare_peft:
        peft_model = _same_in_peft(model, plain_model(options.seed)).to(device)
        arms.append(Arm("PEFT", peft_model, tokenizer, settings, steps))

    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in arms[0].parameters)
    _say("model", f"{options.model} on {device}, {total:,} parameters")
    _say("processes", ranks.count())
    _say("data", f"{options.data}, {len(training):,} to train on, {len(held_out):,} held out")
    _say("trainable", f"{trainable:,} parameters ({100 * trainable / total:.2f} %)")
    results |= {"classes": classes, "total_parameters": total}

    def measured(arm: Arm) -> float:
        return accuracy(predict(arm.model.eval(), tokenizer, held_features), held_features)

    before = [measured(arm) for arm in arms] if ranks.is_first() else []
    if ranks.is_first():
        _say("accuracy before", report.per_cent(before[0]))
    _train(options, arms, train_features, settings, output, results, measured)
    if not ranks.is_first():
        return True

    after = [measured(arm) for arm in arms]
    rows = [_row(arm, *shares) for arm, *shares in zip(arms, before, after, strict=True)]
    results |= rows[0]
    if options.compare_peft:
        results["peft"] = rows[1]
    _say("accuracy after", report.per_cent(after[0]))
    _say("speed", f"{rows[0]['tokens_per_second']:,.0f} tokens/s over {arms[0].seconds:.1f} s")
    losses = rows[0]["losses"]  # finite: training ends at one that is not
    if not _check(
        "trained",
        all(parameter.isfinite().all() for arm in arms for parameter in arm.parameters),
        f"losses and trained weights must be finite; loss {losses[0]:.3f} at the first step, "
        f"{losses[-1]:.3f} at the last",
    ):
        return False

    adapter = output / ADAPTER
    lora.save_adapter(model, adapter)
    results["adapter_bytes"] = report.directory_bytes(adapter)
    _say("adapter", f"{adapter}, {results['adapter_bytes'] / 1000:,.0f} kB")
    plots.curves(
        output / "curves.png",
        f"{Path(options.model).name} on {options.data.name}, LoRA of rank {options.rank}",
        {row["name"]: list(enumerate(row["losses"], start=1)) for row in rows},
        "cross-entropy, nats",
        {"lora_kernels": [(step, 100 * share) for step, share in results["accuracies"]]},
        "accuracy on held-out\nsentences (%)",
    )
    _say("curves", output / "curves.png")

    # Another seed: nothing but what was saved can bring back the trained head.
    fresh = lora.load_adapter(plain_model(options.seed + 1), adapter).to(device)
    merged, unmerged, reloaded = (
        predict(set_merging(which, merge), tokenizer, held_features)
        for which, merge in ((model, True), (model, False), (fresh, True))
    )
    errors = {
        "reload_error": (reloaded - merged).abs().max().item(),
        "merge_error": (unmerged - merged).abs().max().item(),
    }
    results |= errors
    _say("results", output / runs.RESULTS)
    trusted = _trusted(**errors, scale=merged.abs().max().item())
    if options.compare_peft:
        print("\n" + report.comparison(rows))
    return trusted


def _train(
    options: Namespace,
    arms: Sequence[Arm],
    features: Sequence[dict],
    settings: Settings,
    output: Path,
    results: dict,
    measured: Callable[[Arm], float],
) -> None:
    """Trains, from the checkpoint if there is one, and says how it goes after each epoch."""
    file, done, accuracies = output / CHECKPOINT, 0, []
    if file.exists():
        done, kept = checkpoint.load(file, arms)
        accuracies = [tuple(point) for point in kept["accuracies"]]
        _say("resume", f"{file}, behind step {done}")
    elif options.resume:
        _say("resume", "no checkpoint: from the start")
    started, first = time.perf_counter(), None

    def after_turn(step: int) -> None:
        results["step"] = step
        if ranks.is_first() and step % options.save_every == 0:
            checkpoint.save(file, arms, step, {"accuracies": accuracies})

    def after_epoch(epoch: int) -> None:
        nonlocal first
        if not ranks.is_first():
            return
        step = len(arms[0].losses)
        first = epoch if first is None else first
        losses = arms[0].losses[-(step // epoch) :]
        accuracies.append((step, measured(arms[0])))
        seconds = (time.perf_counter() - started) / (epoch - first + 1)
        told = {
            "loss": f"{torch.stack(losses).mean().item():.3f}",
            "held-out accuracy": report.per_cent(accuracies[-1][1]),
        }
        tqdm.write(epoch_line(epoch, settings.epochs, seconds, told))  # beside the bar

    results["accuracies"] = accuracies
    try:
        train(
            arms, features, settings, done=done, save_every=options.save_every,
            after_turn=after_turn, after_epoch=after_epoch,
        )  # fmt: skip
    finally:
        results["losses"] = [loss.item() for loss in arms[0].losses]


def _row(arm: Arm, accuracy_before: float, accuracy_after: float) -> dict:
    return {
        "name": arm.name,
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "trainable_parameters": sum(p.numel() for p in arm.parameters),
        "train_seconds": arm.seconds,
        "tokens": arm.tokens,
        "tokens_per_second": arm.tokens / arm.seconds,
        "losses": torch.stack(arm.losses).tolist(),
    }


def _trusted(reload_error: float, merge_error: float, scale: float) -> bool:
    """Whether the saved adapter is the trained one, and merging changes rounding only."""
    merge_limit = MERGE_TOLERANCE * max(1.0, scale)
    same = _check(
        "reloaded",
        reload_error == 0,
        f"largest difference from the trained model's logits {reload_error:.2g}, must be 0",
    )
    agree = _check(
        "merged",
        merge_error <= merge_limit,
        f"largest difference from the unmerged logits {merge_error:.2g}, at most {merge_limit:.2g}",
    )
    return same and agree


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{ranks.local()}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _same_in_peft(model: nn.Module, plain: nn.Module) -> nn.Module:
    """PEFT's LoRA in a plain model, with the adapter and the head that model starts from."""
    try:
        from peft import PeftModel  # seconds to import, and an extra of its own
    except ImportError:
        raise InputError("--compare-peft: `pip install peft` brings what it needs") from None
    with tempfile.TemporaryDirectory() as directory:
        lora.save_adapter(model, directory)
        return PeftModel.from_pretrained(plain, directory, is_trainable=True)


def _say(label: str, value) -> None:
    if ranks.is_first():
        print(f"{label:<16} {value}", flush=True)


def _check(label: str, passed: bool, measured: str) -> bool:
    _say(label, f"{'ok' if passed else 'FAILED'}: {measured}")
    return passed
