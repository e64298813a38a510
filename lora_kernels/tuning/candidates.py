"""What is tuned: the shapes that differ for a launcher, and configurations worth a try."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from lora_kernels.dispatch.algorithm import SMALL_M
from lora_kernels.kernels import hazards
from lora_kernels.kernels.config import Config, GemmConfig, SkinnyConfig, When
from lora_kernels.kernels.launch import watched
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import LAUNCHERS, kernel_of
from lora_kernels.kernels.selfcheck import WrongKernelError
from lora_kernels.tuning.shapes import Shape

__all__ = [
    "AXES", "as_run", "grid", "in_words", "operands", "source", "thin", "try_out", "without_unused",
]  # fmt: skip

Item = TypeVar("Item")
# The fields of a shape, by what Launcher.depends_on calls them.
AXES = {"m": "m", "k": "k", "n": "n", "r": "r", "p": "dropout_p"}


def without_unused(name: str, shape: Shape) -> Shape:
    """The shape with the least there is of what the launcher's time does not depend on."""
    least, needed = {"k": 1, "n": 1, "p": 0.0}, LAUNCHERS[name].depends_on.split()
    unused: dict[str, Any] = {AXES[a]: value for a, value in least.items() if a not in needed}
    return dataclasses.replace(shape, **unused)


def operands(shape: Shape) -> Operands:
    """What the launchers take at a shape. There is no bias, as in most layers that are tuned."""
    return Operands(dataclasses.replace(shape.problem(), bias=None))


def try_out(task: tuple[str, Shape, Config]) -> None:
    """Compiles and launches one configuration; what is compiled stays in Triton's cache.

    Raises: WrongKernelError if its machine code cannot be trusted; what a launch raises.
    """
    name, shape, config = task
    with watched() as compiled:
        LAUNCHERS[name](operands(shape), config)
    if shape.device == "cuda":
        torch.cuda.synchronize()
    if fault := hazards.fault(compiled, torch.device(shape.device)):
        raise WrongKernelError(fault)


def as_run(name: str, shape: Shape, config: Config) -> Config:
    """The configuration without what makes no difference: epilogue_subtile, if no tile is cut."""
    if isinstance(config, SkinnyConfig) or _cuts_tiles(name, shape):
        return config
    return dataclasses.replace(config, epilogue_subtile=1)


def _cuts_tiles(name: str, shape: Shape) -> bool:
    """Whether the launcher cuts tiles, for a mask or for the scale of columns."""
    return name == "gemm_fwd_scaled" or (name == "gemm_bwd" and shape.dropout_p > 0)


ROWS, COLS, ELEMENTS = (32, 64, 128, 256), (32, 64, 128, 256), range(2048, 16384 + 1)
SKINNY_WARPS = (4, 8)
# num_stages and programs_per_sm: of a kernel that cuts a length into slices, and of those that have
# none to cut.
STAGES_AND_PROGRAMS = ((3, 2), (3, 1), (3, 4), (2, 2), (4, 2))
ONE_STAGE = ((1, 2),)
OTHER_STAGES = ((3, 2), (2, 2), (4, 2))
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
# Of gemm_small_m, whose programs own all rows: BLOCK_N and BLOCK_K; num_warps and num_stages.
STRIPES = tuple(itertools.product((16, 32, 64), (64, 128, 256)))
STRIPE_WARPS_AND_STAGES = ((4, 3), (4, 4), (4, 5), (8, 4))
OTHER_BANDS = (4, 16)  # BAND_M beside 8, of the first of the large tiles
# epilogue_subtile by accumulators a thread. In fewer parts the mask does not fit into registers
# beside 128 of them.
SUBTILES = {128: (4,), 64: (2, 1, 4), 32: (1, 2)}


def grid(name: str, shape: Shape, when: When) -> Sequence[Config]:
    """Configurations worth a try, all different; when: what the shape's entry has to serve.

    Some use tensor descriptors if the entry is for operands that these can describe.
    """
    kernel = kernel_of(name)
    if not kernel.is_gemm:
        pairs: tuple[tuple[int, int], ...] = STAGES_AND_PROGRAMS
        if kernel.name.endswith(("expand", "dequantize", "apply_dropout")):
            # It has no loop over the matrix that it writes, so nothing to prefetch or to cut.
            pairs = ONE_STAGE
        elif kernel.name in ("grouped_grad", "weight_norm"):  # cuts at a fixed length, or nothing
            pairs = OTHER_STAGES
        return [
            SkinnyConfig(rows, cols, warps, *pair)
            for rows, cols, warps, pair in itertools.product(ROWS, COLS, SKINNY_WARPS, pairs)
            if rows * cols in ELEMENTS
        ]
    if kernel.name == "gemm_small_m":
        band = int(min(when.m, SMALL_M))  # the most that the entry has to serve
        stripes = itertools.product(STRIPES, STRIPE_WARPS_AND_STAGES)
        return [GemmConfig(band, *stripe, *pair) for stripe, pair in stripes]
    few = shape.m <= SMALL_M
    cuts = _cuts_tiles(name, shape) and not few
    configs: list[GemmConfig] = []
    for tma in (True, False) if when.tma else (False,):
        for tile, warps, stages in SMALL_M_TILES if few else LARGE_TILES:
            subtiles = SUBTILES[tile[0] * tile[1] // (32 * warps)] if cuts else (1,)
            # The first number of stages with every number of parts, the others with the first.
            cut = [(stages[0], parts) for parts in subtiles]
            cut += [(number, subtiles[0]) for number in stages[1:]]
            configs += [GemmConfig(*tile, warps, number, tma, parts) for number, parts in cut]
        if not few:
            largest = next(config for config in configs if config.tma == tma)
            configs += [dataclasses.replace(largest, BAND_M=tiles) for tiles in OTHER_BANDS]
    return configs


def thin(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many of the items, evenly spread."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def source(half: When | Config) -> str:
    """Either half of an entry, as the tables write it."""
    words = []
    for field in sorted(dataclasses.fields(half), key=lambda field: field.name == "r"):  # r is last
        value = getattr(half, field.name)
        if field.name.startswith("BLOCK_"):
            words.append(str(value))
        elif value != field.default:
            words.append(f"{field.name}={value}")
    return f"{type(half).__name__}({', '.join(words)})"


def in_words(when: When) -> str:
    """Which products an entry serves, for people."""
    words = [f"{when.bits} bits"] if when.bits else []
    bounds = {"m": when.m, "r": when.r}
    words += [f"{axis} <= {most}" for axis, most in bounds.items() if most < math.inf]
    words += ["TMA"] * when.tma + ["factors in terms"] * when.terms
    words += ["float32 factors over float16"] * when.scaled
    return ", ".join(words) or "any product"
