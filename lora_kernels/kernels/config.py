"""Tiles of the kernels: what a configuration says, and which entry of a table serves a product."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lora_kernels.dispatch.algorithm import capability_of


@dataclass(frozen=True)
class SkinnyConfig:
    """Tiles of a kernel that reads one large matrix once: BLOCK_ROWS x BLOCK_COLS of it.

    programs_per_sm: how many programs for each multiprocessor the work is cut into, if possible.
    """

    BLOCK_ROWS: int
    BLOCK_COLS: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a large product.

    tma: operands are read and written through tensor descriptors, and a program computes several
    tiles, one after the other. epilogue_subtile: into how many parts a tile is cut before a dropout
    mask or the scale of columns, which needs registers, is applied: 1, 2 or 4. BAND_M: how many
    tiles below each other are computed before the next column of tiles.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    tma: bool = False
    epilogue_subtile: int = 1
    BAND_M: int = 8


@dataclass(frozen=True)
class When:
    """Which products an entry of a table serves.

    bits: of the operands of the dot; None means any. m, r: the most rows, the highest rank. tma:
    whether the entry is for operands that tensor descriptors can describe, and for no others.
    terms: whether it is for factors of several terms, see split_terms.py, and for no others.
    scaled: whether it is for float32 factors over float16, see scaled.py, and for no others.
    """

    bits: int | None = None
    m: float = math.inf
    r: float = math.inf
    tma: bool = False
    terms: bool = False
    scaled: bool = False

    def holds(self, bits: int, m: int, r: int, tma: bool = False, **kinds: bool) -> bool:
        fits = self.bits in (None, bits) and m <= self.m and r <= self.r
        needed = [kind for kind in ("terms", "scaled") if getattr(self, kind)]
        return fits and (tma or not self.tma) and all(kinds.get(kind) for kind in needed)


Config = SkinnyConfig | GemmConfig


class Tiles(dict[str, list[tuple[When, Config]]]):
    """The table of a kernel: by target, which configuration serves which products."""

    # A key of select's cache: a dict, which has no hash, by its identity.
    __hash__ = object.__hash__  # type: ignore[assignment]


@functools.lru_cache(1024)
def select(
    table: Tiles, target: str, bits: int, m: int = 1, r: int = 1, tma: bool = False, **kinds: bool
) -> Any:
    """The first entry of the target's table that serves such a product, of the table's kind."""
    if target == WAVE32 and target not in table:
        # Warps of half as many lanes, each of which has half as many registers.
        config = select(table, "hip", bits, m, r, tma, **kinds)
        return replace(config, num_warps=2 * config.num_warps)
    entries = table[target]
    return next(config for when, config in entries if when.holds(bits, m, r, tma, **kinds))


class Stand(NamedTuple):
    """What stands for the device of CPU tensors: the key in the tables, and multiprocessors."""

    target: str
    num_sms: int


CPU = Stand("interpreter", 4)  # which runs programs one by one
WAVE32 = "hip_wave32"  # AMD's Radeon GPUs; "hip" are the Instinct ones, whose warps are 64 wide
_TARGETS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def target_of(device: torch.device) -> str:
    """The key of a device in the tables."""
    if device.type == "cpu":
        return CPU.target
    if torch.version.hip is not None:
        return "hip" if capability_of(device) < (10, 0) else WAVE32
    return _TARGETS.get(capability_of(device), "other")


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type == "cpu":
        return CPU.num_sms
    return torch.cuda.get_device_properties(device).multi_processor_count
