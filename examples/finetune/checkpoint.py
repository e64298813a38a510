"""Where training goes on from: what trains, its optimizers, and what has been measured."""

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from examples.errors import InputError
from examples.finetune.train import Arm

__all__ = ["CHECKPOINT", "load", "save"]

CHECKPOINT = "checkpoint.pt"


def save(path: Path, arms: Sequence[Arm], step: int, measured: Mapping) -> None:
    """Written beside, then renamed: a kill at any moment leaves a complete one.

    measured: numbers that training goes on with.
    """
    partial = path.with_suffix(".partial")
    states = {arm.name: arm.state_dict() for arm in arms}
    torch.save({"step": step, "measured": dict(measured), "arms": states}, partial)
    os.replace(partial, path)


def load(path: Path, arms: Sequence[Arm]) -> tuple[int, dict]:
    """Puts a checkpoint into the arms; -> the steps that are done, and what was measured.

    Raises: InputError for a file that is no such checkpoint.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for arm in arms:
            arm.load_state_dict(saved["arms"][arm.name])
        return saved["step"], saved["measured"]
    except (
        OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
