"""What is tuned: launchers, the cells that they tell apart, and configurations worth a try."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from bench.shapes import Cell
from lora_kernels.kernels import da, down, dx, dy_pass, few_rows, fill, forward
from lora_kernels.kernels.launch import (
    Gemm,
    Skinny,
    choose_gemm,
    choose_skinny,
    current,
    fits_tma,
    target_of,
)
from lora_kernels.plan import FEW_ROWS
from tests.kernels import expected
from tests.kernels.expected import Operands

__all__ = [
    "LAUNCHERS", "Config", "Launcher", "as_run", "grid", "operands", "run", "source",
    "table_entry", "takes", "thin", "told_apart", "try_out",
]  # fmt: skip

Config = Skinny | Gemm
Tensors = tuple[Tensor, ...]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Launcher:
    """A launcher and what it computes.

    module: the one that holds its table. uses: which fields of a cell its time depends on.
    dots: by which field of Numerics a table of Skinny is read; None for a table of Gemm.
    """

    module: ModuleType
    uses: str
    dots: str | None
    call: Callable[[Operands, Config | None], Tensors]
    expected: Callable[[Operands, torch.dtype], Tensors]


LAUNCHERS = {
    "down": Launcher(
        down, "m k r dropout_p", "factor",
        lambda o, c: (down.down(o.x, o.a, *_dropout(o), o.numerics, c),),
        lambda o, dtype: (expected.down(o, dtype),),
    ),
    "forward": Launcher(
        forward, "m k n r", None,
        lambda o, c: (
            forward.forward(
                o.x, o.w, o.h, o.b, None, o.problem.scaling, *o.groups, o.numerics, c
            ),
        ),
        lambda o, dtype: (expected.forward(o, None, o.problem.scaling, dtype),),
    ),
    "few_rows": Launcher(
        few_rows, "m k n r dropout_p", None,
        lambda o, c: few_rows.few_rows(
            o.x, o.w, o.a, o.b, None, o.problem.seed, o.problem.scaling, o.problem.dropout_p,
            *o.groups, o.numerics, c,
        ),
        lambda o, dtype: expected.few_rows(o, None, o.problem.scaling, dtype, dtype),
    ),
    "dy_pass": Launcher(
        dy_pass, "m n r", "rank",
        lambda o, c: dy_pass.dy_pass(
            o.dy, o.b, o.h, o.problem.scaling, o.problem.scaling, *o.groups, True, True,
            o.numerics, c,
        ),
        lambda o, dtype: expected.dy_pass(o, o.problem.scaling, o.problem.scaling, dtype, dtype),
    ),
    "dx": Launcher(
        dx, "m k n r dropout_p", None,
        lambda o, c: (dx.dx(o.dy, o.w, o.dh, o.a, *_dropout(o), o.numerics, c),),
        lambda o, dtype: (expected.dx(o, dtype),),
    ),
    "da": Launcher(
        da, "m k r dropout_p", "rank",
        lambda o, c: (da.da(o.dh, o.x, *_dropout(o), o.a.dtype, o.numerics, c),),
        lambda o, dtype: (expected.da(o, dtype),),
    ),
    "fill_y": Launcher(
        fill, "m n r", "update",
        lambda o, c: (
            fill.fill_y(
                o.h, o.b, None, o.problem.scaling, *o.groups, o.x.dtype, o.numerics, c
            ),
        ),
        lambda o, dtype: (expected.fill_y(o, None, o.problem.scaling, dtype),),
    ),
    "fill_dx": Launcher(
        fill, "m k r dropout_p", "update",
        lambda o, c: (fill.fill_dx(o.dh, o.a, *_dropout(o), o.x.dtype, o.numerics, c),),
        lambda o, dtype: (expected.fill_dx(o, dtype),),
    ),
}  # fmt: skip


def _dropout(o: Operands) -> tuple[Tensor, float]:
    return o.problem.seed, o.problem.dropout_p


def told_apart(name: str, cell: Cell) -> Cell:
    """The cell with the least there is of what the launcher does not depend on."""
    least, uses = {"k": 1, "n": 1, "dropout_p": 0.0}, LAUNCHERS[name].uses.split()
    return dataclasses.replace(cell, **{what: v for what, v in least.items() if what not in uses})


def operands(cell: Cell) -> Operands:
    return Operands(cell.problem())


def takes(name: str, o: Operands) -> bool:
    """Whether the launcher is one for these operands."""
    rank, dropout_p = o.b.shape[1], o.problem.dropout_p
    return name != "few_rows" or few_rows.takes(len(o.x), rank, dropout_p, o.numerics)


def run(name: str, o: Operands, config: Config | None) -> Tensors:
    """What the launcher computes, by the table where config is None."""
    with current(o.x):
        return LAUNCHERS[name].call(o, config)


def try_out(task: tuple[str, Cell, Config]) -> None:
    """Compiles and launches one configuration; what is compiled stays in Triton's cache."""
    name, cell, config = task
    run(name, operands(cell), config)
    if cell.device == "cuda":
        torch.cuda.synchronize()


def table_entry(name: str, o: Operands) -> tuple[str, Config]:
    """The name of the entry that the table has for these operands, and the entry."""
    launcher, device = LAUNCHERS[name], o.x.device
    table = launcher.module.CONFIGS
    names = {target: {entry: entry for entry in entries} for target, entries in table.items()}
    if launcher.dots:
        rank = o.b.shape[1] if name == "dy_pass" else 1
        entry = choose_skinny(names, device, getattr(o.numerics, launcher.dots), rank)
    elif name == "few_rows":
        entry = few_rows.choose(names, len(o.x), o.x, o.numerics)
    else:
        entry = choose_gemm(names, len(o.x), o.b.shape[1], o.x, fits_tma(o.x, o.w, o.dy))
    return entry, table[target_of(device)][entry]


def as_run(name: str, cell: Cell, config: Config) -> Config:
    """The configuration without what makes no difference in a cell: pieces, without a mask."""
    masked = name == "dx" and cell.dropout_p > 0
    if isinstance(config, Skinny) or masked:
        return config
    return dataclasses.replace(config, pieces=1)


ROWS, COLS, ELEMENTS = (32, 64, 128, 256), (32, 64, 128, 256), range(2048, 16384 + 1)
SKINNY_WARPS = (4, 8)
# num_stages and waves: where a length is cut into slices, and where there are none.
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
FEW_ROWS_TILES = tuple(
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


def grid(name: str, cell: Cell, tma: bool) -> list[Config]:
    """Configurations worth a try, all different; tma: with descriptors too."""
    if LAUNCHERS[name].dots:
        # fill has no loop over the matrix that it writes, so nothing to prefetch or to cut.
        pairs = ONE_STAGE if LAUNCHERS[name].module is fill else STAGES_AND_WAVES
        return [
            Skinny(rows, cols, warps, *pair)
            for rows, cols, warps, pair in itertools.product(ROWS, COLS, SKINNY_WARPS, pairs)
            if rows * cols in ELEMENTS
        ]
    few = cell.m <= FEW_ROWS
    if name == "few_rows":
        up_to_16 = cell.m <= 16 and cell.dtype != torch.float32
        rows = 16 if up_to_16 else FEW_ROWS  # the most that the cell's entry has to serve
        pairs = itertools.product(STRIPES, STRIPE_WARPS_AND_STAGES)
        return [Gemm(rows, *stripe, *pair) for stripe, pair in pairs]
    masked = name == "dx" and cell.dropout_p > 0 and not few
    configs = []
    for descriptors in (True, False) if tma else (False,):
        for tile, warps, stages in FEW_ROWS_TILES if few else LARGE_TILES:
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
