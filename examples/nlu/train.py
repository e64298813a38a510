"""Training and measuring through Hugging Face's Trainer; checkpoints hold what trains only."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

import lora_kernels as lora
from examples.errors import InputError
from examples.nlu import metrics
from examples.nlu.data import Example
from examples.nlu.model import load_head, save_head
from examples.nlu.tasks import Settings, Task
from examples.progress import epoch_line

__all__ = ["AdapterTrainer", "Clock", "encode", "end_bar", "make_trainer"]

PREDICTION_BATCH = 64
LOGGED_SHARE = 0.01  # of the steps: a hundred points make a curve


class AdapterTrainer(Trainer):
    """Trainer whose checkpoints hold the adapter and the head instead of the whole model.

    They are taken behind an evaluation, when every layer is merged. save_adapter writes lora_A,
    lora_B and the head; no base weight, merged or not, is written.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self._write(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._read(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._read(self.state.best_model_checkpoint)

    def _write(self, directory: str) -> None:
        lora.save_adapter(self.model, directory)

    def _read(self, directory: str) -> None:
        lora.load_adapter(self.model, directory)


class HeadTrainer(AdapterTrainer):
    """The same where the head alone trains."""

    def _write(self, directory: str) -> None:
        save_head(self.model, directory)

    def _read(self, directory: str) -> None:
        load_head(self.model, directory)


TRAINERS = {"lora": AdapterTrainer, "head": HeadTrainer, "full": Trainer}


class Clock(TrainerCallback, ExportableState):
    """The seconds that training takes in this process, from the making of the clock on.

    Checkpoints keep them: a resumed run counts those up to its checkpoint and those from there on,
    and nothing of what a kill threw away.
    """

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        return {
            "train_seconds": time.perf_counter() - self._wall,
            "train_cpu_seconds": time.process_time() - self._cpu,
        }

    def state(self) -> dict:
        return {"args": {}, "attributes": self.spent()}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step:  # a checkpoint's
            earlier = state.stateful_callbacks[type(self).__name__]["attributes"]
            self._wall -= earlier["train_seconds"]
            self._cpu -= earlier["train_cpu_seconds"]


class _Best(TrainerCallback):
    """The best checkpoint lies beside the others, whose states hold the path that it once had."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.best_global_step:
            folder = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(folder) if folder.is_dir() else None


class _Progress(ProgressCallback):
    """One bar, with the loss, and a line for each epoch; it ends at a diverged run."""

    def __init__(self, measure: str):
        super().__init__()
        self._measure = measure
        self._started, self._first = 0.0, 0.0
        self._losses: list[float] = []  # logged in this epoch

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._started, self._first = time.perf_counter(), state.epoch or 0.0
        if self.training_bar is not None:  # a checkpoint's steps are done
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            self._end(args, state, control, f"the loss is {loss}")
        self._losses.append(loss)
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{loss:.3f}")

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        pass  # a second bar below the first leaves empty lines in files

    def on_epoch_end(self, args, state, control, model, **kwargs) -> None:
        # Before the weights are measured and saved.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                self._end(args, state, control, f"{name} is not finite")
        if args.eval_strategy == "no":
            self._tell(args, state, {})

    def _end(self, args, state, control, why: str) -> NoReturn:
        self.on_train_end(args, state, control)
        raise InputError(
            f"--lr {args.learning_rate:g}: the run has diverged: {why} at step {state.global_step}"
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        value = (metrics or {}).get(f"eval_{self._measure}")
        self._tell(args, state, {} if value is None else {self._measure: f"{value:.4f}"})

    def _tell(self, args, state, measured: dict) -> None:
        losses, self._losses = self._losses, []
        if self.training_bar is None:
            return
        told = {"loss": f"{fmean(losses):.3f}"} if losses else {}
        seconds = (time.perf_counter() - self._started) / max(state.epoch - self._first, 1e-9)
        line = epoch_line(round(state.epoch, 2), args.num_train_epochs, seconds, told | measured)
        self.training_bar.write(line)


def end_bar(trainer: Trainer) -> None:
    """Of a run that was interrupted: before anything is told of it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Progress) and callback.training_bar is not None:
            callback.training_bar.close()
            callback.training_bar = None


def encode(tokenizer, examples: Sequence[Example], max_length: int) -> list[dict]:
    """The examples as the collator takes them: token ids, and the label."""
    sentences = [example.sentence for example in examples]
    pairs = [example.pair for example in examples] if examples and examples[0].pair else None
    encoded = tokenizer(sentences, pairs, truncation=True, max_length=max_length)
    return [
        {name: column[i] for name, column in encoded.items()} | {"labels": example.label}
        for i, example in enumerate(examples)
    ]


def make_trainer(
    model: nn.Module,
    tokenizer,
    task: Task,
    settings: Settings,
    training: Sequence[dict],
    dev: Sequence[dict],
    *,
    method: str,
    output: Path,
    seed: int,
    keep: str = "best",
    precision: str = "fp32",
    accumulation: int = 1,
    group_by_length: bool = False,
    cpu: bool = False,
) -> Trainer:
    """A Trainer for model; AdamW, linear schedule, gradients clipped at norm 1.

    keep: "best" measures on dev and takes a checkpoint every epoch, and ends with the weights of
    the epoch whose score on dev was the highest; "last" ends with those of the last epoch; "none"
    neither measures nor takes checkpoints on the way.
    """
    # The Trainer would trust these models to divide their loss by all examples of a step, and leave
    # it undivided by --accumulation and multiplied by the number of processes. They do not divide.
    model.accepts_loss_kwargs = False
    strategy = "no" if keep == "none" else "epoch"
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=PREDICTION_BATCH,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        eval_strategy=strategy,
        save_strategy=strategy,
        save_total_limit=1,  # and the best one, which alone is left in the end
        load_best_model_at_end=keep == "best",
        metric_for_best_model=None if keep == "none" else task.metrics[0],
        greater_is_better=None if keep == "none" else True,
        logging_steps=LOGGED_SHARE,
        logging_nan_inf_filter=False,  # which would log 0 for NaN
        train_sampling_strategy="group_by_length" if group_by_length else "random",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=cpu,
        # Every weight of LoRA and of the head has a part in every step.
        ddp_find_unused_parameters=method == "full",
        dataloader_pin_memory=torch.cuda.is_available() and not cpu,
        disable_tqdm=False,
        report_to=[],
        seed=seed,
        label_names=["labels"],
    )
    trainer = TRAINERS[method](
        model=model,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=training,
        eval_dataset=dev,
        processing_class=tokenizer,
        compute_metrics=lambda out: metrics.score(task, out.predictions, out.label_ids),
    )
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(_Progress(task.metrics[0]))
    trainer.add_callback(_Best)
    return trainer
