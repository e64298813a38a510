"""What tuning and roofline know of the kernels, until kernels/registry.py says it of each launcher.

Everything here has its place in an entry of the registry: the launcher, the module that holds its
table, which fields of a shape its time depends on, its formula, FLOPs and bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

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
from lora_kernels.tuning.shapes import Shape
from tests.kernels import expected
from tests.kernels.expected import Operands

__all__ = [
    "KERNELS", "LAUNCHERS", "WORK", "Config", "Gemm", "Launcher", "Operands", "Skinny", "operands",
    "run", "table_entry", "takes", "target_of",
]  # fmt: skip

Config = Skinny | Gemm
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Launcher:
    """A launcher and what it computes.

    module: the one that holds its table. uses: which fields of a shape its time depends on.
    dots: by which field of Numerics a table of Skinny is read; None for a table of Gemm.
    """

    module: ModuleType
    uses: str
    dots: str | None
    call: Callable[[Operands, Config | None], Tensors]
    expected: Callable[[Operands, torch.dtype], Tensors]


def _dropout(o: Operands) -> tuple[Tensor, float]:
    return o.problem.seed, o.problem.dropout_p


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
# FLOPs and bytes of each launcher of this package. Factors and their gradients have e bytes an
# element as x has, h and dh four.
WORK = {
    "down": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
    "forward": lambda m, k, n, r, e: (
        2 * m * n * (k + r),
        e * (m * k + n * k + m * n + n * r) + 4 * m * r,
    ),
    "few_rows": lambda m, k, n, r, e: (
        2 * m * n * (k + r) + 2 * m * k * r,
        e * (m * k + n * k + m * n + r * k + n * r) + 4 * m * r,
    ),
    "fill_y": lambda m, k, n, r, e: (2 * m * n * r, e * (m * n + n * r) + 4 * m * r),
    "fill_dx": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
    "dy_pass": lambda m, k, n, r, e: (4 * m * n * r, e * (m * n + 2 * n * r) + 8 * m * r),
    "dx": lambda m, k, n, r, e: (
        2 * m * k * (n + r),
        e * (m * n + n * k + m * k + r * k) + 4 * m * r,
    ),
    "da": lambda m, k, n, r, e: (2 * m * k * r, e * (m * k + r * k) + 4 * m * r),
}
# What launches the kernels in one step, forward + backward, by what their names hold.
KERNELS = {
    "_down_kernel": ("down",),
    "_forward_kernel": ("forward",),
    "_few_rows_kernel": ("few_rows",),
    "_fill_kernel": ("fill_y", "fill_dx"),
    "_dy_pass_kernel": ("dy_pass",),
    "_dx_kernel": ("dx",),
    "_da_kernel": ("da",),
}


def operands(shape: Shape) -> Operands:
    """What the launchers take at a shape."""
    return Operands(shape.problem())


def takes(name: str, o: Operands) -> bool:
    """Whether the launcher is one for these operands."""
    rank, dropout_p = o.b.shape[1], o.problem.dropout_p
    return name != "few_rows" or few_rows.takes(len(o.x), rank, dropout_p, o.numerics)


def run(name: str, o: Operands, config: Config | None) -> Tensors:
    """What the launcher computes, by its table if config is None."""
    with current(o.x):
        return LAUNCHERS[name].call(o, config)


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
