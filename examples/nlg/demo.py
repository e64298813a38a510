"""All of it on a small GPT-2: pretrain a stand-in, adapt it with LoRA, measure before and after."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lora_kernels as lora
from examples import runs
from examples.devices import is_cpu
from examples.finetune.model import set_merging
from examples.nlg import data, metrics
from examples.nlg.data import Example
from examples.nlg.decode import Search, decode, write_predictions
from examples.nlg.model import add_lora, load_model, load_tokenizer
from examples.nlg.train import Progress, Settings, mean_loss, train

__all__ = ["ON_CPU", "ON_GPU", "Plan", "run"]

HELD_OUT = 0.1  # of the contexts
SEED, BATCH_SEED = 0, 110  # those of README's figures


@dataclass(frozen=True)
class Plan:
    """Sizes of the model, of its pretraining and of its adaptation."""

    width: int
    layers: int
    heads: int
    pretraining: Settings
    adaptation: Settings
    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.1
    max_length: int = 160
    search: Search = field(default_factory=lambda: Search(max_length=160, batch_size=32))


ON_CPU = Plan(
    width=256, layers=4, heads=4,
    pretraining=Settings(
        epochs=2, batch_size=16, lr=2e-3, warmup=40, label_smoothing=0.0, seed=BATCH_SEED
    ),
    adaptation=Settings(epochs=1, batch_size=8, lr=3e-3, warmup=20, seed=BATCH_SEED),
)  # fmt: skip
ON_GPU = Plan(
    width=512, layers=8, heads=8,
    pretraining=Settings(
        epochs=20, batch_size=32, lr=1e-3, warmup=100, label_smoothing=0.0, seed=BATCH_SEED
    ),
    adaptation=Settings(epochs=10, batch_size=8, lr=1e-3, warmup=100, seed=BATCH_SEED),
)  # fmt: skip


def run(options: Namespace, examples: Sequence[Example], plan: Plan | None = None) -> int:
    """Carries out the plan; 0, or 1 where a check of the result failed."""
    cpu = is_cpu(options.device)
    plan = plan or (ON_CPU if cpu else ON_GPU)
    record = {"plan": asdict(plan), "versions": runs.versions()}
    with runs.reported(options.output / runs.RESULTS, record) as results:
        good = _carry_out(options, examples, plan, cpu, results)
        if not good:
            results["status"] = "failed"
    return 0 if good else 1


def _carry_out(
    options: Namespace, examples: Sequence[Example], plan: Plan, cpu: bool, results: dict
) -> bool:
    """Puts what it finds into results; whether the checks of it passed."""
    started, output = time.perf_counter(), options.output
    tokenizer = load_tokenizer(options.vocabulary, "--vocabulary")
    training, held = data.split_by_context(examples, HELD_OUT, SEED)
    adapting, pretraining = data.split_by_context(training, 0.5, SEED)
    groups = data.group(held)
    features, held_features = (
        data.encode(tokenizer, part, plan.max_length) for part in (adapting, held)
    )
    _say("data", f"{len(groups)} of {len(data.group(examples))} contexts held out, with "
         f"{len(held):,} texts; {len(pretraining):,} texts to pretrain, {len(adapting):,} to "
         f"adapt")  # fmt: skip

    documents = _documents(tokenizer, pretraining, plan.max_length)
    base, progress = _pretrain(tokenizer, documents, plan, cpu)
    base.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    _say("pretrained", _told(progress, base))

    model = load_model(str(output / "base")).to(base.device).eval()
    before = _measure("before", model, tokenizer, groups, held_features, plan, output)
    torch.manual_seed(SEED)
    add_lora(model, plan.rank, plan.alpha, plan.dropout)
    progress = train(model, tokenizer, features, plan.adaptation, cpu=cpu)
    lora.save_adapter(model, output / "adapter")
    _say("adapted", _told(progress, model))
    after = _measure(
        "after", set_merging(model, True), tokenizer, groups, held_features, plan, output
    )

    unmerged = decode(set_merging(model, False), tokenizer, groups, plan.search)
    fresh = load_model(str(output / "base")).to(model.device)
    lora.merge_lora(lora.load_adapter(fresh, output / "adapter"))
    checks = {
        "unmerged decoding differs in": sum(
            a != b for a, b in zip(after["predictions"], unmerged, strict=True)
        ),
        "reloaded adapter's loss differs by": abs(
            mean_loss(fresh, tokenizer, held_features) - after["loss"]
        ),
    }
    seconds = time.perf_counter() - started
    _report(before, after, checks, seconds)
    results |= {
        "before": _plain(before),
        "after": _plain(after),
        "checks": checks,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_second": progress.tokens / progress.seconds,
        "seconds": seconds,
        "losses": progress.losses,
    }
    _say("results", output / runs.RESULTS)
    return after["loss"] < before["loss"] and not any(checks.values())


def _plain(measured: dict) -> dict:
    """As JSON can hold it: of a metric that is missing its reason."""
    scores = {
        name: {"reason": value.reason} if isinstance(value, metrics.Missing) else value
        for name, value in measured["scores"].items()
    }
    return {**measured, "scores": scores}


def _documents(tokenizer, examples: Sequence[Example], max_length: int) -> list[dict]:
    """The task the other way round: end-of-text, ' ' + text, end-of-text, context, end-of-text.

    All of it is predicted. It has the words and the names, and ties them to the attributes, as web
    text does for a real GPT-2; it never has a text behind a context.
    """
    end, rows = [tokenizer.eos_token_id], []
    for example in examples:
        text = tokenizer(" " + example.completion)["input_ids"]
        tokens = [*end, *text, *end, *tokenizer(example.context)["input_ids"], *end][:max_length]
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


def _pretrain(
    tokenizer, documents: list[dict], plan: Plan, cpu: bool
) -> tuple[GPT2LMHeadModel, Progress]:
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=plan.width, n_layer=plan.layers, n_head=plan.heads,
        n_positions=plan.max_length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return model, train(model, tokenizer, documents, plan.pretraining, cpu=cpu)


def _measure(name, model, tokenizer, groups, features, plan: Plan, output: Path) -> dict:
    predictions = decode(model, tokenizer, groups, plan.search)
    write_predictions(output / f"{name}.jsonl", groups, predictions)
    scores = metrics.score("e2e", groups, predictions)["all"]
    loss = mean_loss(model, tokenizer, features)
    return {"loss": loss, "scores": scores, "predictions": predictions}


def _report(before: dict, after: dict, checks: dict, seconds: float) -> None:
    print(f"\n{'held out':<12}{'before':>10}{'after':>10}")
    print(f"{'loss':<12}{before['loss']:>10.3f}{after['loss']:>10.3f}")
    for name in before["scores"]:
        values = [result["scores"][name] for result in (before, after)]
        told = [
            f" missing: {value.reason}" if isinstance(value, metrics.Missing) else f"{value:>10.2f}"
            for value in values
        ]
        print(f"{name:<12}{''.join(told)}")
    print()
    for name, value in checks.items():
        print(f"{'FAILED' if value else 'ok'}: {name} {value:g}")
    _say("time", f"{seconds:.0f} s")


def _told(progress: Progress, model) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{trained:,} of {total:,} parameters, {progress.step} steps, "
        f"{progress.tokens / progress.seconds:,.0f} tokens/s, {progress.seconds:.0f} s, loss "
        f"{progress.losses[0]:.2f} to {progress.losses[-1]:.2f}"
    )


def _say(label: str, value) -> None:
    print(f"{label:<12}{value}", flush=True)
