"""Tiles that were measured on this machine's GPU, in place of those of the kernels' tables."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch

from lora_kernels.dispatch import cache, measured
from lora_kernels.kernels.config import Config, GemmConfig, SkinnyConfig, When, select, target_of
from lora_kernels.kernels.registry import KERNELS

__all__ = ["as_json", "use"]

_CONFIGS = {kind.__name__: kind for kind in (GemmConfig, SkinnyConfig)}


@functools.cache
def use(device: torch.device) -> None:
    """Puts the tiles of this GPU's file into the tables; once in a process.

    GPUs of one capability share a table. Tiles are used if they are all of one model.
    """
    found = measured.tiles(device)
    if not found or not _all_alike(device):
        return
    target = target_of(device)
    try:
        places = []
        for tile in found:
            table, (when, config) = KERNELS[tile["kernel"]].tiles[target], _parsed(tile)
            places.append((table, [entry for entry, _ in table].index(when), (when, config)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = cache.path_of(measured.KIND, device)
        cache.ignored(path, f"of its tiles, {type(error).__name__}: {error}")
        return
    for table, index, entry in places:
        table[index] = entry
    select.cache_clear()


def as_json(kernel: str, when: When, config: Config) -> dict:
    """Tiles as the file has them."""
    bounds = {
        name: None if value == math.inf else value
        for name, value in dataclasses.asdict(when).items()
    }
    kind = type(config).__name__
    return {
        "kernel": kernel,
        "when": bounds,
        "config": {"type": kind, **dataclasses.asdict(config)},
    }


def _parsed(tile: Mapping) -> tuple[When, Config]:
    bounds, numbers = dict(tile["when"]), dict(tile["config"])
    config = _CONFIGS[numbers.pop("type")](**numbers)
    for name, number in numbers.items():
        least = 0 if name == "tma" else 1
        if not isinstance(number, int) or number < least:
            raise TypeError(f"{name} must be a whole number, at least {least}, got {number!r}")
    for name in ("m", "r"):
        bounds[name] = math.inf if bounds[name] is None else bounds[name]
    return When(**bounds), config


def _all_alike(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return len(names) == 1
