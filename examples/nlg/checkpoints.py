"""Checkpoints of accelerate that hold an adapter, and a record of what they are a run of."""

import hashlib
import json
import shutil
from pathlib import Path

from accelerate import Accelerator
from torch import nn

import lora_kernels as lora
from examples.errors import InputError
from examples.record import differences, short
from examples.runs import has_ended

__all__ = [
    "CHECKPOINTS",
    "check_fresh",
    "check_same",
    "complete",
    "keep_adapters_only",
    "save",
    "weights_hash",
]

CHECKPOINTS, RECORD = "checkpoints", "run.json"
SAMPLE = 256  # numbers of a weight, at least: all of them would take seconds for a large model


def check_fresh(output: Path, resume: bool) -> bool:
    """output has no checkpoints of a run, or it is to be resumed; else an InputError.

    -> whether there is a run that has ended.
    """
    if not complete(output / CHECKPOINTS):
        return False
    ended = has_ended(output) is not None
    if not resume:
        what = "tells its results" if ended else "goes on with it"
        raise InputError(
            f"--output {output}: holds a run: --resume {what}, another folder starts anew"
        )
    return ended


def complete(checkpoints: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return sorted(checkpoints.glob("step-*"))


def check_same(checkpoint: Path, record: dict) -> None:
    """checkpoint was saved with this record; else an InputError that tells what has changed."""
    path = checkpoint / RECORD
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    changed = differences(saved, record)
    if changed:
        raise InputError(f"{checkpoint}: of a run with other settings: {', '.join(changed)}")


def weights_hash(model: nn.Module) -> str:
    """Of numbers spread over each weight that does not train: another base model has others."""
    sample = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            step = weight.numel() // SAMPLE | 1  # odd: not always the same column
            numbers = weight.detach().flatten()[::step].cpu().numpy()
            sample.update(name.encode() + numbers.tobytes())
    return short(sample)


def save(accelerator: Accelerator, checkpoints: Path, step: int, record: dict) -> None:
    """Written beside, then renamed: a kill at any moment leaves a complete one."""
    partial = checkpoints / f"partial-{step:08d}"
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        older = [*complete(checkpoints), *checkpoints.glob("partial-*")]
        partial.rename(checkpoints / f"step-{step:08d}")
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def keep_adapters_only(accelerator: Accelerator) -> None:
    """Has accelerate's checkpoints hold an adapter in the place of the whole model."""

    def save(models, weights, directory) -> None:
        if accelerator.is_main_process:
            lora.save_adapter(accelerator.unwrap_model(models[0]).model, directory)
        weights.clear()

    def load(models, directory) -> None:
        lora.load_adapter(accelerator.unwrap_model(models[0]).model, directory)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
