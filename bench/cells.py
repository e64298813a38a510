"""The grid: what is measured, cell by cell."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from lora_kernels.checks import dtype_name
from lora_kernels.tuning.rows import BOTH, EAGER, FORWARD, GRAPH
from lora_kernels.tuning.shapes import (
    DTYPES,
    GPT2_MEDIUM,
    LLAMA_3_8B,
    LLAMA_QKV,
    SETS,
    Layer,
    Shape,
)

__all__ = ["Cell", "representative", "select"]


@dataclass(frozen=True)
class Cell(Shape):
    """A layer at one shape, in one mode: forward, backward, or one step of both."""

    mode: str = FORWARD
    execution: str = EAGER

    def __str__(self) -> str:
        groups = "".join("01"[on] for on in self.enable_lora)
        layer = f"merged{groups}" if self.merged else "linear"
        graph = f" {GRAPH}" if self.execution == GRAPH else ""
        factors = "" if self.factors is None else f"/{dtype_name(self.factors)}"
        return (
            f"{layer} {self.k}x{self.n} m{self.m} r{self.r} p{self.dropout_p:g} "
            f"{self.dtype_name}{factors} {self.device} {self.mode}{graph}"
        )

    def fields(self) -> dict:
        """What a result row says of this cell."""
        factors = None if self.factors is None else dtype_name(self.factors)
        own = {**vars(self), "dtype": self.dtype_name, "factors": factors}
        return {"kind": "layer", "cell": str(self), **own}


# What a set of layers is multiplied by on a device, unless asked otherwise; of the set "all" with
# more ranks, of "decode" with fewer tokens.
TOKENS = {"cuda": (1, 16, 64, 512, 4096, 8191, 8192, 16384), "cpu": (512,)}
RANKS, ALL_RANKS = {"cuda": (16,), "cpu": (8,)}, {"cuda": (8, 12, 16, 64, 128), "cpu": (8,)}
EXECUTIONS = {"cuda": (GRAPH, EAGER), "cpu": (EAGER,)}
DECODE_TOKENS = (1, 16, 64)
DROPOUT = (0.0, 0.1)


def select(
    device: str,
    sets: Collection[str] = (),
    *,
    mode: Collection[str] = (),
    execution: Collection[str] = (),
    tokens: Collection[int] = (),
    ranks: Collection[int] = (),
    dropout: Collection[float] = (),
    factors: torch.dtype | None = None,
) -> list[Cell]:
    """The cells of sets of layers, or without sets the representative ones.

    Of an axis that is named only those values: a set takes them in place of its own, the
    representative cells are thinned out by them. factors: the dtype of all factors.
    """
    if factors is not None:
        axes = {"mode": mode, "execution": execution, "tokens": tokens, "ranks": ranks}
        found = select(device, sets, dropout=dropout, **axes)
        return [replace(cell, factors=factors) for cell in found]
    if not sets:
        wanted = {
            "mode": mode, "execution": execution, "m": tokens, "r": ranks, "dropout_p": dropout,
        }  # fmt: skip
        return [
            cell
            for cell in representative(device)
            if all(not values or getattr(cell, name) in values for name, values in wanted.items())
        ]
    cells = []
    for name in sets:
        own_tokens = DECODE_TOKENS if name == "decode" else TOKENS[device]
        own_ranks = (ALL_RANKS if name == "all" else RANKS)[device]
        cells += [
            _cell(device, layer, m, r, *others)
            for layer, m, r, *others in itertools.product(
                SETS[name], tokens or own_tokens, ranks or own_ranks, dropout or DROPOUT,
                mode or (FORWARD, BOTH), execution or EXECUTIONS[device],
            )
        ]  # fmt: skip
    return list(dict.fromkeys(cells))  # sets overlap


def _cell(device: str, layer: Layer, m: int, r: int, p: float, mode: str, execution: str) -> Cell:
    return Cell(
        m, r=r, dropout_p=p, mode=mode, execution=execution, device=device, dtype=DTYPES[device],
        **vars(layer),
    )  # fmt: skip


def representative(device: str) -> list[Cell]:
    """What ``pytest bench/`` measures unasked, in less than five minutes."""
    if device == "cpu":
        small, large = Layer(768, 768), Layer(2048, 2048)

        def cell(layer, m=512, p=0.1, mode=BOTH):
            return _cell("cpu", layer, m, 8, p, mode, EAGER)

        grid = itertools.product((small, large, GPT2_MEDIUM[1]), DROPOUT, (FORWARD, BOTH))
        others = itertools.product((small, large), (16, 128))
        return [
            *(cell(layer, p=p, mode=mode) for layer, p, mode in grid),
            *(cell(layer, m) for layer, m in (*others, (small, 2048))),
        ]
    square = Layer(4096, 4096)

    def cell(layer, m=8192, p=0.1, mode=BOTH, execution=GRAPH):
        return _cell("cuda", layer, m, 16, p, mode, execution)

    return [
        *(cell(layer) for layer in (*LLAMA_3_8B, Layer(8192, 8192))),
        cell(square, p=0.0),
        cell(square, mode=FORWARD),
        cell(square, execution=EAGER),
        cell(square, m=512),
        cell(square, m=16),
        cell(square, m=16, execution=EAGER),
        cell(GPT2_MEDIUM[1]),
        cell(LLAMA_QKV[1]),
    ]
