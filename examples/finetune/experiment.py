"""The run itself: load, measure, train, measure, save, reload, check, report."""

import math
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import lora_kernels as lora
from examples.errors import InputError
from examples.finetune import ranks, report
from examples.finetune.data import Example
from examples.finetune.model import add_lora, load_model, load_tokenizer, locate, set_merging
from examples.finetune.train import Arm, Settings, accuracy, encode, predict, train

__all__ = ["run"]

# Merging rounds each weight once more: a few float32 steps per layer on logits of this size.
MERGE_TOLERANCE = 1e-4
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
    output = _output_directory(options.output)
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
    _say("ranks", ranks.count())
    _say("data", f"{options.data}, {len(training):,} to train on, {len(held_out):,} held out")
    _say("trainable", f"{trainable:,} parameters ({100 * trainable / total:.2f} %)")
    if ranks.is_first():
        before = [_held_out_accuracy(arm, tokenizer, held_features) for arm in arms]
        _say("accuracy before", report.per_cent(before[0]))
    train(arms, train_features, settings)
    if not ranks.is_first():
        return 0

    after = [_held_out_accuracy(arm, tokenizer, held_features) for arm in arms]
    rows = [_row(arm, *shares) for arm, *shares in zip(arms, before, after, strict=True)]
    _say("accuracy after", report.per_cent(after[0]))
    _say("speed", f"{rows[0]['tokens_per_second']:,.0f} tokens/s over {arms[0].seconds:.1f} s")
    losses = rows[0]["losses"]
    if not _check(
        "trained",
        all(map(math.isfinite, losses)),
        f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last",
    ):
        return 1

    adapter = output / "adapter"
    lora.save_adapter(model, adapter)
    adapter_bytes = report.directory_bytes(adapter)
    _say("adapter", f"{adapter}, {adapter_bytes / 1000:,.0f} kB")
    report.loss_curve({row["name"]: row["losses"] for row in rows}, output / "loss.png")
    _say("loss curve", output / "loss.png")

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
    metrics = {
        "model": options.model,
        "data": str(options.data),
        "device": str(device),
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "training_examples": len(training),
        "held_out_examples": len(held_out),
        "classes": classes,
        "ranks": ranks.count(),
        "total_parameters": total,
        "adapter_bytes": adapter_bytes,
        **errors,
        **rows[0],
    }
    if options.compare_peft:
        metrics["peft"] = rows[1]
    report.write_metrics(metrics, output / "metrics.json")
    _say("metrics", output / "metrics.json")
    trusted = _trusted(**errors, scale=merged.abs().max().item())
    if options.compare_peft:
        print("\n" + report.comparison(rows))
    return 0 if trusted else 1


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


def _output_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be made: {error.strerror}") from None
    return path


def _same_in_peft(model: nn.Module, plain: nn.Module) -> nn.Module:
    """PEFT's LoRA in a plain model, with the adapter and the head that model starts from."""
    try:
        from peft import PeftModel  # seconds to import, and an extra of its own
    except ImportError:
        raise InputError("--compare-peft: `pip install peft` brings what it needs") from None
    with tempfile.TemporaryDirectory() as directory:
        lora.save_adapter(model, directory)
        return PeftModel.from_pretrained(plain, directory, is_trainable=True)


def _held_out_accuracy(arm: Arm, tokenizer, features: Sequence[dict]) -> float:
    return accuracy(predict(arm.model.eval(), tokenizer, features), features)


def _say(label: str, value) -> None:
    if ranks.is_first():
        print(f"{label:<16} {value}", flush=True)


def _check(label: str, passed: bool, measured: str) -> bool:
    _say(label, f"{'ok' if passed else 'FAILED'}: {measured}")
    return passed
