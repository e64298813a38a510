"""What `lora-kernels tune` and LORA_KERNELS_TUNE=first-use have measured on this machine's GPU.

Algorithms by GEMM shape, as entries that go before those of table.py; and tiles by kernel, which
kernels/measured_tiles.py puts into the kernels' tables.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_kernels.checks import dtype_name
from lora_kernels.dispatch import cache
from lora_kernels.dispatch.table import TuningEntry

__all__ = [
    "KIND", "SOURCE", "add", "as_json", "changes", "clear", "content", "entries", "forget", "tiles",
]  # fmt: skip

KIND = "tuned"  # of the file in the cache
SOURCE = "this GPU"
_changes = [0]
_BOUNDS = ("m", "n", "k", "r")
_FLAGS = ("dropout", "tma", "backward", "uniform")


@functools.cache
def content(device: torch.device) -> dict[str, list[dict]]:
    """What the file holds: ``algorithms`` and ``tiles``; both empty if there is none, or a bad one.

    It is read once in a process. A file that does not hold this is ignored, with one warning.
    """
    return _read(device) or {"algorithms": [], "tiles": []}


def _read(device: torch.device) -> dict[str, list[dict]]:
    """The content of the file as it is now; {} if there is none, or a bad one."""
    found = cache.read(KIND, device)
    if not found:
        return {}
    try:
        for entry in found["algorithms"]:
            _entry(entry, (0, 0))
        if not all(isinstance(tile, dict) for tile in found["tiles"]):
            raise TypeError("tiles must be objects")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return cache.ignored(cache.path_of(KIND, device), f"{type(error).__name__}: {error}")
    return found


@functools.cache
def entries(device: torch.device, capability: tuple[int, int]) -> tuple[TuningEntry, ...]:
    """The algorithms of the file, the last that was measured first."""
    found = content(device)["algorithms"]
    return tuple(_entry(entry, capability) for entry in reversed(found))


def tiles(device: torch.device) -> Sequence[Mapping]:
    """The tiles of the file: kernel, when and config, as kernels/measured_tiles.py has them."""
    return content(device)["tiles"]


def add(
    device: torch.device, algorithms: Sequence[Mapping] = (), tiles: Sequence[Mapping] = ()
) -> None:
    """Adds to what is measured: to the file, and in this process.

    An equal entry with another verdict is replaced.
    Raises: OSError if the file cannot be written; this process has the entries all the same.
    """
    own = content(device)
    its = _read(device) or own  # another process may have added to it
    merged = {
        "algorithms": _merged(its["algorithms"], own["algorithms"], algorithms),
        "tiles": _merged(its["tiles"], own["tiles"], tiles),
    }
    own.update(merged)
    _changed()
    cache.write(KIND, device, merged)


def clear(device: torch.device | None) -> list:
    """Removes what is measured on a device, or on all GPUs if it is None; returns the paths."""
    forget()
    return cache.clear(KIND, device)


def forget() -> None:
    """The file is read again when something is asked."""
    content.cache_clear()
    _changed()


def changes() -> int:
    """How often what is measured has changed in this process."""
    return _changes[0]


def _changed() -> None:
    entries.cache_clear()
    _changes[0] += 1


def as_json(entry: TuningEntry, ratio: Sequence[float] | None = None) -> dict:
    """An entry as the file has it; ratio: the time of fused over that of addmm, with its bounds."""
    found = {name: [_finite(bound) for bound in getattr(entry, name)] for name in _BOUNDS}
    return {
        **found,
        "dtype": dtype_name(entry.dtype),
        **{name: getattr(entry, name) for name in (*_FLAGS, "algorithm")},
        "ratio": None if ratio is None else list(ratio),
    }


def _entry(found: Mapping, capability: tuple[int, int]) -> TuningEntry:
    values: dict[str, Any] = {name: found[name] for name in _FLAGS}
    for name in _BOUNDS:
        low, high = found[name]
        values[name] = (float(low), math.inf if high is None else float(high))
    dtype, algorithm = getattr(torch, found["dtype"]), found["algorithm"]
    if not isinstance(dtype, torch.dtype) or algorithm not in ("fused", "addmm"):
        raise ValueError(f"{found['dtype']}, {algorithm} must be a dtype, and fused or addmm")
    return TuningEntry(capability, dtype, algorithm, SOURCE, **values)


def _finite(bound: float) -> float | None:
    return None if math.isinf(bound) else bound


def _merged(*lists: Sequence[Mapping]) -> list[dict]:
    """All of the lists, the last one of those that differ in their verdict alone."""
    verdicts = ("algorithm", "config", "ratio")
    found: dict[str, dict] = {}
    for entry in (dict(entry) for entries in lists for entry in entries):
        key = repr(sorted((name, value) for name, value in entry.items() if name not in verdicts))
        found.pop(key, None)  # the last is the newest
        found[key] = entry
    return list(found.values())
