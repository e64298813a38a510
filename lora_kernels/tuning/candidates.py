"""What is tuned: the shapes that a launcher tells apart, and configurations worth a try."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch

from lora_kernels.dispatch.algorithm import SMALL_M
from lora_kernels.tuning import launchers
from lora_kernels.tuning.launchers import LAUNCHERS, Config, Gemm, Skinny
from lora_kernels.tuning.shapes import Shape

__all__ = ["as_run", "grid", "source", "thin", "try_out", "without_unused"]

Item = TypeVar("Item")


def without_unused(name: str, shape: Shape) -> Shape:
    """The shape with the least there is of what the launcher's time does not depend on."""
    least, uses = {"k": 1, "n": 1, "dropout_p": 0.0}, LAUNCHERS[name].uses.split()
    unused = {field: value for field, value in least.items() if field not in uses}
    return dataclasses.replace(shape, **unused)


def try_out(task: tuple[str, Shape, Config]) -> None:
    """Compiles and launches one configuration; what is compiled stays in Triton's cache."""
    name, shape, config = task
    launchers.run(name, launchers.operands(shape), config)
    if shape.device == "cuda":
        torch.cuda.synchronize()


def as_run(name: str, shape: Shape, config: Config) -> Config:
    """The configuration without what makes no difference at a shape: pieces, without a mask."""
    masked = name == "dx" and shape.dropout_p > 0
    if isinstance(config, Skinny) or masked:
        return config
    return dataclasses.replace(config, pieces=1)


ROWS, COLS, ELEMENTS = (32, 64, 128, 256), (32, 64, 128, 256), range(2048, 16384 + 1)
SKINNY_WARPS = (4, 8)
# num_stages and waves of a kernel that cuts a length into slices, and of one that has none to cut.
STAGES_AND_WAVES = ((3, 2), (3, 1), (3, 4), (2, 2), (4, 2))
ONE_STAGE = ((1, 2),)
# (BLOCK_M, BLOCK_N, BLOCK_K), num_warps, num_stages with the most likely first.
LARGE_TILES = (
    ((128, 256, 64), 8, (3, 4)),
    ((256, 128, 64), 8, (3, 4)),
    ((128, 128, 64), 8, (4, 3)),
    ((128, 128, 64), 4, (3, 4)),
    ((64, 256, 64), 4, (3, 4)),
    ((64, 128, 64), 4, (4, 3)),
    ((128, 64, 64), 4, (4, 3)),
    ((128, 128, 128), 8, (3,)),
    ((128, 256, 32), 8, (4, 5)),
    ((128, 128, 32), 8, (4, 5)),
    ((128, 64, 32), 8, (3, 4)),
)
SMALL_M_TILES = tuple(
    (tile, 4, (3, 4, 5))
    for tile in (
        (16, 64, 128), (16, 128, 64), (16, 128, 128), (32, 64, 64), (32, 64, 128), (32, 128, 64),
        (64, 32, 128), (64, 64, 64), (64, 64, 128), (64, 128, 64),
    )
)  # fmt: skip
# Of few_rows, whose programs own all rows: BLOCK_N and BLOCK_K; num_warps and num_stages.
STRIPES = tuple(itertools.product((16, 32, 64), (64, 128, 256)))
STRIPE_WARPS_AND_STAGES = ((4, 3), (4, 4), (4, 5), (8, 4))
OTHER_BANDS = (4, 16)  # GROUP_M beside 8, of the first of the large tiles
# By accumulators a thread. In fewer pieces the mask does not fit into registers beside 128 of them.
PIECES = {128: (4,), 64: (2, 1, 4), 32: (1, 2)}


def grid(name: str, shape: Shape, tma: bool) -> list[Config]:
    """Configurations worth a try, all different; tma: with descriptors too."""
    if LAUNCHERS[name].dots:
        # fill has no loop over the matrix that it writes, so nothing to prefetch or to cut.
        pairs = ONE_STAGE if LAUNCHERS[name].module is launchers.fill else STAGES_AND_WAVES
        return [
            Skinny(rows, cols, warps, *pair)
            for rows, cols, warps, pair in itertools.product(ROWS, COLS, SKINNY_WARPS, pairs)
            if rows * cols in ELEMENTS
        ]
    few = shape.m <= SMALL_M
    if name == "few_rows":
        up_to_16 = shape.m <= 16 and shape.dtype != torch.float32
        rows = 16 if up_to_16 else SMALL_M  # the most that the shape's entry has to serve
        pairs = itertools.product(STRIPES, STRIPE_WARPS_AND_STAGES)
        return [Gemm(rows, *stripe, *pair) for stripe, pair in pairs]
    masked = name == "dx" and shape.dropout_p > 0 and not few
    configs = []
    for descriptors in (True, False) if tma else (False,):
        for tile, warps, stages in SMALL_M_TILES if few else LARGE_TILES:
            pieces = PIECES[tile[0] * tile[1] // (32 * warps)] if masked else (1,)
            # The first number of stages in all numbers of pieces, the others in the first.
            pairs = [(stages[0], count) for count in pieces]
            pairs += [(number, pieces[0]) for number in stages[1:]]
            configs += [Gemm(*tile, warps, number, descriptors, count) for number, count in pairs]
        if not few:
            largest = next(config for config in configs if config.tma == descriptors)
            configs += [dataclasses.replace(largest, GROUP_M=rows) for rows in OTHER_BANDS]
    return configs


def thin(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many of the items, evenly spread."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def source(config: Config) -> str:
    """The configuration as the tables write it."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.startswith("BLOCK_"):
            words.append(str(value))
        elif value != field.default:
            words.append(f"{field.name}={value}")
    return f"{type(config).__name__}({', '.join(words)})"
