"""What a run is, and the checkpoint that it goes on from."""

import hashlib
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
from examples.record import content_hash, short
from examples.runs import RESULTS, check, has_ended, read_json

__all__ = ["TRAINED", "checkpoint", "finished", "record", "weights_hash"]

TRAINED = "trained"  # the weights that count, beside the checkpoints
STATE = "trainer_state.json"  # the Trainer's, in a checkpoint


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
        "data_hash": content_hash(data),
        "train": options.train,
        "training_examples": len(data.train),
        "keep": options.keep,
        "accumulation": options.accumulation,
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
    return short(digest) if path.is_file() or files else None


def finished(output: Path, this: Mapping) -> dict | None:
    """What results.json says of the run with the record this, None where it has not ended."""
    results = has_ended(output)
    if results is None or not (output / TRAINED).is_dir():
        return None
    return results if {key: results.get(key) for key in this} == this else None


def checkpoint(output: Path, this: Mapping, resume: bool) -> str | None:
    """Path of the newest complete checkpoint in output, None where there is none.

    this: the record of the run that is to go on from it.
    Raises: InputError where output holds what another run left, or without resume any; and where
    the checkpoint of the best epoch so far, whose weights count in the end, is missing.
    """
    folders = [f for f in output.glob("checkpoint-*") if _step(f).isdecimal()]
    left = [*folders, *([output / TRAINED] if (output / TRAINED).exists() else [])]
    # Of a run that did not end, results.json is no loss.
    ended = read_json(output / RESULTS)
    if (output / RESULTS).exists() and (ended is None or ended.get("status") in (None, "complete")):
        left.append(output / RESULTS)
    if not check(output, this, left, resume, _flat):
        return None
    complete = [f for f in folders if _is_complete(f, this["processes"])]
    if not complete:
        return None
    newest = max(complete, key=lambda f: int(_step(f)))
    best = read_json(newest / STATE).get("best_global_step")
    if this["keep"] == "best" and best and output / f"checkpoint-{best}" not in complete:
        raise InputError(
            f"--output {output}: checkpoint-{best}, the best before {newest.name}, is missing or "
            "not complete: another folder starts anew"
        )
    return str(newest)


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
    if read_json(folder / STATE) is None:
        return False
    try:
        weights = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
    except (OSError, SafetensorError):
        return False
    zips = ["optimizer.pt", "scheduler.pt", *random]
    return bool(weights) and all(zipfile.is_zipfile(folder / name) for name in zips)
