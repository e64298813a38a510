"""One run: load, adapt, train, measure, save, report."""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, Trainer

from examples import runs
from examples.devices import is_cpu
from examples.errors import InputError
from examples.finetune.model import load_tokenizer, locate
from examples.nlu import metrics, report, resume
from examples.nlu.data import Data
from examples.nlu.model import adapt, load_model, positions, start_from
from examples.nlu.tasks import Settings, Task, settings
from examples.nlu.train import Clock, encode, end_bar, make_trainer
from examples.pretrained import from_pretrained

__all__ = ["choose_settings", "run"]

FALLBACK = "roberta-base"
FIXED = ("name", "start")  # of Settings: no flag sets them alone


def choose_settings(options: Namespace, task: Task) -> Settings:
    """The row for the model, or the row named by --settings, with what options set themselves."""
    name = options.settings or Path(options.model).name
    try:
        chosen = settings(name, task.name)
    except InputError:
        if options.settings:
            raise
        print(f"settings: the paper has none for {name}; those of {FALLBACK}", file=sys.stderr)
        chosen = settings(FALLBACK, task.name)
    own = {key: getattr(options, key) for key in asdict(chosen) if key not in FIXED}
    return replace(chosen, **{key: value for key, value in own.items() if value is not None})


def run(options: Namespace, task: Task, data: Data) -> dict:
    """Carries out what options ask for; what results.json holds."""
    chosen = choose_settings(options, task)
    # Said outright: else the Trainer neither joins processes on a CPU nor computes in bfloat16.
    cpu = is_cpu(options.device)
    if cpu and options.precision == "fp16":
        raise InputError("--precision fp16: needs a GPU; bf16 runs on a CPU too")
    device = "cpu" if cpu else torch.accelerator.current_accelerator().type
    location = locate(options.model)
    record = resume.record(options, task, chosen, data, _model_hash(location), device)
    output = _output(options, chosen)
    checkpoint = None
    if options.resume and (found := resume.finished(output, record)):
        _say("resume", "the run has ended")
        _tell(found["dev"], output / runs.RESULTS)
        return found
    if not options.evaluate_only:
        checkpoint = resume.checkpoint(output, record, options.resume)
    if options.resume:
        _say("resume", checkpoint or "no complete checkpoint: from the start")
    tokenizer = load_tokenizer(location)
    # Scores of a head that nobody trained would be noise.
    new_head = not options.evaluate_only or options.adapter is not None
    model = load_model(location, task, chosen, tokenizer, options.seed, new_head)
    adapt(model, options.method, chosen, options.dropout, options.targets)
    _load_adapter(model, options, task, chosen)
    max_length = min(chosen.max_length, tokenizer.model_max_length, positions(model))
    training = encode(tokenizer, data.train, max_length)
    # By length: little padding, and the order changes no metric.
    dev = {
        name: sorted(encode(tokenizer, rows, max_length), key=lambda row: -len(row["input_ids"]))
        for name, rows in data.dev.items()
    }
    trainer = make_trainer(
        model, tokenizer, task, chosen, training, next(iter(dev.values())),
        method=options.method, output=output, seed=options.seed, keep=options.keep,
        precision=options.precision, accumulation=options.accumulation,
        group_by_length=options.group_by_length, cpu=cpu,
    )  # fmt: skip
    if trainer.args.world_size != record["processes"]:
        raise InputError(
            f"WORLD_SIZE is {record['processes']}, and the Trainer has {trainer.args.world_size} "
            "processes: each would train by itself"
        )
    if trainer.args.n_gpu > 1:  # the Trainer's DataParallel, with that many batches a step
        raise InputError(
            f"this process sees {trainer.args.n_gpu} GPUs: torchrun or accelerate launch start one "
            "for each, CUDA_VISIBLE_DEVICES=0 lets it see one"
        )
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _say("model", f"{options.model}, {total:,} parameters, {trainable:,} train")
    _say("data", ", ".join([f"{len(training):,} to train on"] + [
        f"{len(rows):,} {name}" for name, rows in dev.items()
    ]))  # fmt: skip
    before = report.peak_memory(trainer.args.device)
    # The report counts results.json alone: a run that was measured again is no further seed.
    file = output / ("evaluated.json" if options.evaluate_only else runs.RESULTS)
    if trainer.is_world_process_zero() and not (options.evaluate_only or checkpoint):
        runs.write_json(record, output / runs.RECORD)
    told = {
        **record,
        "versions": runs.versions(),
        "total_parameters": total,
        "trainable_parameters": trainable,
        "paper_score": None,
    }
    with runs.reported(file, told, trainer.is_world_process_zero) as results:
        spent = {"train_seconds": 0.0, "train_cpu_seconds": 0.0}
        try:
            if not options.evaluate_only:
                spent = _train(trainer, output, checkpoint)
        finally:
            results["log"] = trainer.state.log_history
        measured = {name: _measure(trainer, task, rows) for name, rows in dev.items()}
        saved = 0 if options.evaluate_only else report.weight_bytes(output / resume.TRAINED)
        results |= {
            "dev": measured,
            **({"paper_score": metrics.paper_score(task, measured)} if set(task.dev) <= set(dev)
               else {}),
            **spent,
            "peak_memory_bytes": report.peak_memory(trainer.args.device),
            "memory_before_training_bytes": before,
            "saved_bytes": saved,
            "log": trainer.state.log_history,
        }  # fmt: skip
    if trainer.is_world_process_zero() and not options.evaluate_only:
        report.draw(results, task, output / "curves.png")
    _tell(measured, file)
    return results


def _model_hash(location: str) -> str | None:
    """Of the weights in a folder; for a name on the hub the commit that holds them."""
    config = from_pretrained(AutoConfig, location)
    return resume.weights_hash(location) or config._commit_hash


def _output(options: Namespace, chosen: Settings) -> Path:
    output = options.output or Path(
        "runs/nlu", Path(options.model).name, chosen.name, options.task,
        f"{options.method}-{options.seed}",
    )  # fmt: skip
    return runs.made(output)


def _load_adapter(model: nn.Module, options: Namespace, task: Task, chosen: Settings) -> None:
    alpha_chosen = options.alpha is not None or options.settings is not None
    if options.adapter:
        start_from(model, options.adapter, chosen, with_head=True, alpha_chosen=alpha_chosen)
        _say("adapter", f"{options.adapter}, with its head")
    elif options.start_from:
        left_out = start_from(
            model, options.start_from, chosen, with_head=False, alpha_chosen=alpha_chosen
        )
        _say("adapter", f"{options.start_from}, without its head: left out {', '.join(left_out)}")
    elif options.method == "lora" and chosen.start:
        _say(
            "adapter",
            f"none; the paper's run on {task.title} starts from one trained on {chosen.start} "
            "(--start-from)",
        )


def _train(trainer: Trainer, output: Path, checkpoint: str | None) -> dict[str, float]:
    """Trains, from the checkpoint where there is one, and saves; the time that all of it took."""
    clock = Clock()
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        end_bar(trainer)
    spent = clock.spent()
    trainer.save_model(str(output / resume.TRAINED))
    return spent


def _measure(trainer: Trainer, task: Task, rows: Sequence[dict]) -> dict[str, float]:
    out = trainer.predict(rows)
    return {**metrics.score(task, out.predictions, out.label_ids), "examples": len(rows)}


def _tell(measured: Mapping[str, Mapping], file: Path) -> None:
    for name, scores in measured.items():
        _say(name, ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
    _say("results", file)


def _say(label: str, value) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
        print(f"{label:<10} {value}", flush=True)
