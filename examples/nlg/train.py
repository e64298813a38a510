"""Training through accelerate: any number of devices, mixed precision, accumulation, resuming."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, get_scheduler

from examples.errors import InputError
from examples.nlg.checkpoints import (
    check_same,
    complete,
    keep_adapters_only,
    weights_hash,
)
from examples.nlg.checkpoints import save as save_checkpoint
from examples.nlg.model import CompletionLoss
from examples.record import content_hash

__all__ = ["Progress", "Settings", "mean_loss", "train"]

BETAS, EPS = (0.9, 0.999), 1e-6


@dataclass(frozen=True)
class Settings:
    """The defaults are the paper's for GPT-2 medium on E2E (appendix D.3), which has no seed."""

    epochs: int = 5
    batch_size: int = 8  # per device
    accumulation: int = 1  # batches per step
    lr: float = 2e-4
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    seed: int = 0


class Progress:
    """How far training is, and what was measured; saved and loaded with each checkpoint.

    batch counts within the epoch. The same on every process, as only one saves it.
    """

    def __init__(self):
        self.step = self.epoch = self.batch = 0
        self.has_begun = False  # the run: no checkpoint of another one is in its way
        self.losses: list = []  # of each step, the mean over its predicted tokens
        self.held_out: list = []  # step and loss of each epoch
        self.tokens = 0
        self.seconds = 0.0

    def state_dict(self) -> dict:
        losses = [float(loss) for loss in self.losses]
        return vars(self) | {"losses": losses, "tokens": int(self.tokens)}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def train(
    model,
    tokenizer,
    features: Sequence[dict],
    settings: Settings,
    *,
    made_of: dict | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
    cpu: bool = False,
    checkpoints: Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    after_epoch: Callable[[int], None] | None = None,
) -> Progress:
    """Trains what requires a gradient in model, in place, and leaves it on accelerate's device.

    features: of data.encode. made_of: what else decides the result, such as the rank; a run that
    has other entries, settings, frozen weights, features or processes cannot resume this one.
    checkpoints: a directory that gets the newest checkpoint every save_every steps and after each
    epoch: the adapter, and the state of optimizer, schedule, random numbers and data loader.
    resume: goes on from there, as if there had been no break, or starts where there is none.
    progress: a new one, which tells how far training came if it does not return.
    cpu: not on a GPU, though there is one.
    after_epoch(number of epochs done) runs on the main process.
    Raises: InputError for a checkpoint of another run, for fp16 on a CPU, and for weights whose
    loss is no number where a checkpoint or an epoch's end is due.
    """
    on_cpu = cpu or not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise InputError("--precision fp16: needs a GPU; bf16 runs on a CPU too")
    accelerator = Accelerator(
        cpu=on_cpu,  # unasked, accelerate lets processes on a CPU train each by itself
        mixed_precision="no" if precision == "fp32" else precision,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed
        ),
    )
    set_seed(settings.seed, device_specific=True)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr, betas=BETAS, eps=EPS, weight_decay=settings.weight_decay,
    )  # fmt: skip
    loader = DataLoader(
        features, settings.batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer),
        # A loader without one draws from the global generator whenever an epoch starts or resumes.
        generator=torch.Generator(),
    )  # fmt: skip
    module, prepared, loader = accelerator.prepare(
        CompletionLoss(model, settings.label_smoothing), optimizer, loader
    )
    steps_per_epoch = -(-len(loader) // settings.accumulation)
    total = settings.epochs * steps_per_epoch
    # Not prepared: accelerate would step it once per device.
    schedule = get_scheduler("linear", optimizer, settings.warmup, total)
    progress = progress or Progress()
    accelerator.register_for_checkpointing(schedule, progress)
    keep_adapters_only(accelerator)
    record = {
        **(made_of or {}),
        **asdict(settings),
        "precision": precision,
        "processes": accelerator.num_processes,
        "frozen weights": weights_hash(model),
        "examples": f"{len(features)} with hash {content_hash(list(features))}",
    }
    if resume and (found := complete(checkpoints)):
        check_same(found[-1], record)
        accelerator.load_state(found[-1])
    progress.has_begun = True

    def save() -> None:
        if checkpoints is not None:
            save_checkpoint(accelerator, checkpoints, progress.step, record)

    bar = tqdm(
        total=total, initial=progress.step, unit="step", desc="training",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with bar:
        while progress.epoch < settings.epochs:
            loader.set_epoch(progress.epoch)
            batches = iter(accelerator.skip_first_batches(loader, progress.batch))
            module.train()
            start = time.perf_counter()
            while step := list(islice(batches, settings.accumulation)):
                loss, tokens = _backward(accelerator, module, step)
                prepared.step()
                prepared.zero_grad()
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()
                progress.losses.append(loss)
                progress.tokens += tokens
                progress.batch += len(step)
                progress.step += 1
                bar.update()
                at_end = progress.step % steps_per_epoch == 0
                if progress.step % save_every == 0 or at_end:
                    _check_loss(accelerator, module, step[-1], progress.step, settings.lr)
                if progress.step % 10 == 0:
                    bar.set_postfix(loss=f"{float(progress.losses[-1]):.3f}")
                if progress.step % save_every == 0 and not at_end:
                    progress.seconds += time.perf_counter() - start
                    save()
                    start = time.perf_counter()
            float(progress.tokens)  # waits for the device
            progress.seconds += time.perf_counter() - start
            progress.epoch, progress.batch = progress.epoch + 1, 0
            if after_epoch is not None and accelerator.is_main_process:
                after_epoch(progress.epoch)
            save()
    accelerator.wait_for_everyone()
    progress.load_state_dict(progress.state_dict())  # numbers, no tensors of a device
    accelerator.free_memory()
    return progress


@torch.no_grad()
def mean_loss(model, tokenizer, features: Sequence[dict], batch_size: int = 32) -> float:
    """Mean negative log-likelihood of the predicted tokens, without smoothing, in eval mode."""
    was_training = model.training
    module = CompletionLoss(model, 0.0).eval()
    collate, total, count = DataCollatorForSeq2Seq(tokenizer), 0.0, 0
    ordered = sorted(features, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size]).to(model.device)
        predicted = int(_predicted(batch["labels"]))
        total += float(module(**batch)) * predicted
        count += predicted
    model.train(was_training)
    return total / count


def _backward(accelerator: Accelerator, module, step: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """Gradients of the mean over all predicted tokens in the batches of all processes.

    step: the batches of this one. -> that mean, and the number of tokens, predicted or not.
    """
    own = [_predicted(batch["labels"]) for batch in step]
    tokens = sum(batch["attention_mask"].sum() for batch in step)
    predicted, tokens = accelerator.reduce(torch.stack([sum(own), tokens]), "sum")
    losses = []
    for i, batch in enumerate(step):
        last = i == len(step) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            mean = module(**batch)
            loss = mean * (own[i].to(mean) / predicted)
            accelerator.backward(loss * accelerator.num_processes)  # whose gradients are averaged
        losses.append(loss.detach())
    return accelerator.reduce(torch.stack(losses).sum(), "sum"), tokens


def _predicted(labels: Tensor) -> Tensor:
    """How many tokens of a batch CompletionLoss takes the mean over."""
    return (labels[:, 1:] != -100).sum()


@torch.no_grad()
def _check_loss(accelerator: Accelerator, module, batch: dict, step: int, lr: float) -> None:
    """The weights give a loss: an update that has made them too large shows in the next one only.

    In eval mode, which draws no random numbers: the run goes on as if it had not been measured.
    """
    loss = float(accelerator.reduce(module.eval()(**batch), "mean"))
    module.train()
    if not math.isfinite(loss):
        raise InputError(f"after step {step} the loss is {loss}: --lr {lr:g} too high?")
