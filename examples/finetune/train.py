"""Training by turns, and prediction."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DataCollatorWithPadding, get_scheduler

from examples.errors import InputError
from examples.finetune import ranks
from examples.finetune.data import Example, random_batches, sorted_batches

__all__ = ["Arm", "Settings", "accuracy", "encode", "predict", "train"]

TURN = 10  # batches before another arm takes over, steps between two looks at the loss
WARMUP = 0.06  # of all steps
CLIP_NORM = 1.0
PREDICTION_BATCH = 64


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch_size: int
    lr: float
    seed: int


def encode(tokenizer, examples: Sequence[Example], classes: list[int], max_length: int) -> list:
    """The examples as the collator takes them: token ids and the index of the class."""
    encoded = tokenizer(
        [example.sentence for example in examples], truncation=True, max_length=max_length
    )
    return [
        {name: column[i] for name, column in encoded.items()}
        | {"labels": classes.index(example.label)}
        for i, example in enumerate(examples)
    ]


class Arm:
    """A model under training: its optimizer, its schedule and what has been measured of it."""

    def __init__(self, name: str, model: nn.Module, tokenizer, settings: Settings, steps: int):
        self.name = name
        self.model = model
        self.parallel = ranks.parallel(model)
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr)
        self.schedule = get_scheduler("linear", self.optimizer, round(WARMUP * steps), steps)
        self.collate = DataCollatorWithPadding(tokenizer)
        self.losses: list[Tensor] = []
        self.seconds = 0.0
        self.tokens = 0

    def state_dict(self) -> dict:
        """What training goes on with; of the model what trains."""
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": torch.stack(self.losses),
            "seconds": self.seconds,
            "tokens": self.tokens,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses = list(state["losses"].to(self.device))
        self.seconds, self.tokens = state["seconds"], state["tokens"]

    def train_on(
        self,
        batches: Sequence[list[dict]],
        seed: int,
        after_batch: Callable[[Tensor], None] = lambda loss: None,
    ) -> None:
        """One optimizer step per batch, of which every rank computes its share.

        seed: of the first batch, the others count on. The same one draws the same dropout in every
        arm. after_batch(loss).
        """
        self.model.train()
        self._wait()
        start = time.perf_counter()
        for number, features in enumerate(batches, start=seed):
            torch.manual_seed(number * ranks.count() + ranks.rank())
            rows, weight = ranks.share(features)
            loss = self.parallel(**self.collate(rows).to(self.device)).loss * weight
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(ranks.mean(loss.detach()))
            after_batch(self.losses[-1])
        self._wait()
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(row["input_ids"]) for features in batches for row in features)

    def warm_up(self, batch: list[dict]) -> None:
        """A step without an update: what the first one of a process or a shape costs besides."""
        self.model.train()
        self.parallel(**self.collate(ranks.share(batch)[0]).to(self.device)).loss.backward()
        self.optimizer.zero_grad()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def train(
    arms: Sequence[Arm],
    features: Sequence[dict],
    settings: Settings,
    *,
    done: int = 0,
    save_every: int = 100,
    after_turn: Callable[[int], None] = lambda step: None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Trains every arm on the same batches in the same order.

    Several arms take turns of ten batches, and every other turn in reverse order, so that whatever
    else the machine does falls on all of them alike. Before the first turn each takes a step that
    is not timed. Turns end at every multiple of save_every, too.
    done: steps that the arms have behind them, as after_turn(step) was told. after_epoch(number of
    epochs done) comes before the last turn of an epoch is told of.
    Raises: InputError, behind a turn, for a loss that is no finite number.
    """
    lengths = [len(row["input_ids"]) for row in features]
    generator = random.Random(settings.seed)
    steps = settings.epochs * -(-len(features) // settings.batch_size)
    step, order = 0, list(arms)
    with tqdm(
        total=steps * len(arms), initial=done * len(arms), unit="step", desc="training",
        disable=not ranks.is_first(),
    ) as progress:  # fmt: skip

        def after_batch(loss: Tensor) -> None:
            if progress.update():  # has drawn the bar: the loss waits for the device
                progress.set_postfix(loss=f"{loss.item():.3f}")

        for epoch in range(settings.epochs):
            batches = random_batches(lengths, settings.batch_size, generator)
            if epoch == 0 and len(arms) > 1:
                for arm in arms:
                    arm.warm_up([features[i] for i in batches[0]])
            start = 0
            while start < len(batches):
                end = min(start + TURN, start + save_every - step % save_every)
                if step < done:
                    end = min(end, start + done - step)
                turn = [[features[i] for i in batch] for batch in batches[start:end]]
                start, step = end, step + len(turn)
                if step <= done:
                    continue
                for arm in order:
                    arm.train_on(turn, settings.seed + step - len(turn), after_batch)
                    progress.set_postfix(loss=f"{arm.losses[-1].item():.3f}")
                    _check_finite(arm, len(turn), settings.lr)
                order.reverse()
                if start >= len(batches):
                    after_epoch(epoch + 1)
                after_turn(step)


def _check_finite(arm: Arm, last: int, lr: float) -> None:
    losses = torch.stack(arm.losses[-last:])
    if not losses.isfinite().all():
        at = int((~losses.isfinite()).nonzero()[0])
        raise InputError(
            f"at step {len(arm.losses) - last + at + 1} the loss of {arm.name} is {losses[at]:g}: "
            f"--lr {lr:g} too high?"
        )


@torch.no_grad()
def predict(model: nn.Module, tokenizer, features: Sequence[dict]) -> Tensor:
    """Logits [examples, classes] on the CPU, in the order of features, in the model's mode."""
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    order = sorted_batches([len(row["input_ids"]) for row in features], PREDICTION_BATCH)
    logits = [model(**collate([features[i] for i in batch]).to(device)).logits for batch in order]
    positions = torch.tensor([i for batch in order for i in batch])
    return torch.cat(logits).cpu()[positions.argsort()]


def accuracy(logits: Tensor, features: Sequence[dict]) -> float:
    """The share of rows whose largest logit is that of their class."""
    classes = torch.tensor([row["labels"] for row in features])
    return (logits.argmax(1) == classes).double().mean().item()
