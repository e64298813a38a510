"""What a run is, and the checkpoint that it goes on from."""

import hashlib
import json
import os
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open

from examples.errors import InputError
from examples.nlu.data import Data
from examples.nlu.tasks import Settings, Task

__all__ = ["RECORD", "checkpoint", "record", "weights_hash"]

RECORD = "run.json"  # beside the checkpoints: the record of their run
HASH_DIGITS = 12


def record(
    options: Namespace,
    task: Task,
    settings: Settings,
    data: Data,
    model_hash: str | None,
    device: str,
) -> dict:
    """What decides the outcome of a run; results.json begins with it.

    model_hash: of the model's weights, whatever their path. device: kind of it, as "cuda".
    train: how many examples --train asked for, None for all.
    """
    return {
        "task": task.name,
        "model": options.model,
        "model_hash": model_hash,
        "method": options.method,
        "seed": options.seed,
        "settings": asdict(settings),
        "dropout": options.dropout,
        "targets": options.targets,
        "adapter": options.adapter,
        "adapter_hash": options.adapter and weights_hash(options.adapter),
        "start_from": options.start_from,
        "start_from_hash": options.start_from and weights_hash(options.start_from),
        "data": options.data,
        "data_hash": hashlib.sha256(json.dumps(data).encode()).hexdigest()[:HASH_DIGITS],
        "train": options.train,
        "training_examples": len(data.train),
        "keep": options.keep,
        "accumulate": options.accumulate,
        "group_by_length": options.group_by_length,
        "precision": options.precision,
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),  # torchrun's and accelerate's
    }


def weights_hash(path: str) -> str | None:
    """The hash of the weights in a file or folder, None where there are none.

    Of a folder: of its safetensors, or without those of its .bin files.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digest = hashlib.sha256()
    try:
        for file in [path] if path.is_file() else files:
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:HASH_DIGITS] if path.is_file() or files else None


def checkpoint(output: Path, this: Mapping, resume: bool) -> str | None:
    """Path of the newest complete checkpoint in output, None where there is none.

    this: the record of the run that is to go on from it.
    Raises: InputError for checkpoints of a run with another record, and without resume for any.
    """
    folders = [f for f in output.glob("checkpoint-*") if _step(f).isdecimal()]
    if not folders:
        return None
    try:
        other = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"--output {output}: holds checkpoints, and no {RECORD} that says of what run: another "
            "folder starts anew"
        ) from None
    was, now = _flat(other), _flat(this)
    differing = [
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in now | was
        if was.get(key) != now.get(key)
    ]
    if differing:
        raise InputError(
            f"--output {output}: holds checkpoints of another run: {'; '.join(differing)}: "
            "another folder starts anew"
        )
    if not resume:
        raise InputError(
            f"--output {output}: holds checkpoints: --resume goes on from the last, another "
            "folder starts anew"
        )
    complete = [f for f in folders if _is_complete(f, this["processes"])]
    return str(max(complete, key=lambda f: int(_step(f)))) if complete else None


def _step(folder: Path) -> str:
    return folder.name.removeprefix("checkpoint-")


def _flat(record: Mapping) -> dict:
    """One level: settings.name says "settings", as the flag does, its other fields themselves."""
    rest = {key: value for key, value in record.items() if key != "settings"}
    settings = dict(record["settings"])
    return {"settings": settings.pop("name"), **settings, **rest}


def _is_complete(folder: Path, processes: int) -> bool:
    """Whether all of a checkpoint was written: the Trainer writes its own state last.

    Only the other processes may be behind with their random state. A file of torch.save is a zip,
    whose directory stands at its end.
    """
    random = (
        [f"rng_state_{rank}.pth" for rank in range(processes)]
        if processes > 1
        else ["rng_state.pth"]
    )
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
    except (OSError, ValueError, SafetensorError):
        return False
    zips = ["optimizer.pt", "scheduler.pt", *random]
    return bool(weights) and all(zipfile.is_zipfile(folder / name) for name in zips)
