"""The grid: what is measured, cell by cell."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import torch

from lora_kernels.testing.problem import Problem, make_problem

__all__ = ["EXECUTIONS", "MODES", "SETS", "Cell", "representative", "select"]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, BOTH)
EAGER, GRAPH = "eager", "graph"  # a step as Python issues it, or as a CUDA graph replays it
EXECUTIONS = (EAGER, GRAPH)


@dataclass(frozen=True)
class Cell:
    """One layer at one shape: x [m, k] -> y [m, n], in groups of columns where there are several.

    out_splits: the sizes of the groups; None makes them equal.
    """

    m: int
    k: int
    n: int
    r: int
    dropout_p: float
    mode: str
    enable_lora: tuple[bool, ...] = (True,)
    out_splits: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    execution: str = EAGER

    @property
    def merged(self) -> bool:
        return len(self.enable_lora) > 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        groups = "".join("01"[on] for on in self.enable_lora)
        layer = f"merged{groups}" if self.merged else "linear"
        graph = f" {GRAPH}" if self.execution == GRAPH else ""
        return (
            f"{layer} {self.k}x{self.n} m{self.m} r{self.r} p{self.dropout_p:g} "
            f"{self.dtype_name} {self.device} {self.mode}{graph}"
        )

    def fields(self) -> dict:
        """What a result row says of this cell."""
        return {
            "kind": "layer",
            "cell": str(self),
            "m": self.m,
            "k": self.k,
            "n": self.n,
            "r": self.r,
            "dropout_p": self.dropout_p,
            "enable_lora": list(self.enable_lora),
            "out_splits": self.out_splits and list(self.out_splits),
            "dtype": self.dtype_name,
            "device": self.device,
            "mode": self.mode,
            "execution": self.execution,
        }

    def problem(self) -> Problem:
        """Random operands of this cell, the same in every run; drawn where they are needed."""
        torch.manual_seed(0)
        groups = len(self.enable_lora)
        sizes = self.out_splits or (self.n // groups,) * groups
        with torch.device(self.device):
            return make_problem(
                self.m, self.k, self.n, self.r, device=self.device, dtype=self.dtype,
                dropout_p=self.dropout_p,
                groups=list(zip(sizes, self.enable_lora, strict=True)),
            )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """[K, N] of a layer, and its groups where it has several."""

    k: int
    n: int
    enable_lora: tuple[bool, ...] = (True,)
    out_splits: tuple[int, ...] | None = None


QUERY_AND_VALUE = (True, False, True)
GPT2_MEDIUM_QKV = Layer(1024, 3072, QUERY_AND_VALUE)
# Grouped-query attention, which loralib's equal groups cannot serve, and as many heads for all.
LLAMA_GROUPED_QKV = Layer(4096, 6144, QUERY_AND_VALUE, (4096, 1024, 1024))
LLAMA_QKV = Layer(4096, 12288, QUERY_AND_VALUE)

LLAMA_3_8B = [Layer(4096, 4096), Layer(4096, 1024), Layer(4096, 14336), Layer(14336, 4096)]
SQUARE = [Layer(size, size) for size in (2048, 4096, 8192)]
GPT2_MEDIUM = [Layer(1024, 3072), GPT2_MEDIUM_QKV]
SETS = {
    "llama3-8b": [*LLAMA_3_8B, LLAMA_GROUPED_QKV, LLAMA_QKV],
    "gpt2-medium": GPT2_MEDIUM,
    "square": SQUARE,
    "decode": [*LLAMA_3_8B, Layer(8192, 8192)],
    "all": [
        *SQUARE, *LLAMA_3_8B[1:], Layer(5120, 13824), *GPT2_MEDIUM, LLAMA_GROUPED_QKV, LLAMA_QKV,
    ],
}  # fmt: skip
DECODE_TOKENS = (1, 16, 64)
DROPOUT = (0.0, 0.1)


@dataclass(frozen=True)
class Axes:
    """What a set of layers is multiplied by on a device, unless asked otherwise."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    all_ranks: tuple[int, ...]  # of the set "all"
    dtype: torch.dtype
    executions: tuple[str, ...]


AXES = {
    "cuda": Axes(
        tokens=(1, 16, 64, 512, 4096, 8191, 8192, 16384),
        ranks=(16,),
        all_ranks=(8, 12, 16, 64, 128),
        dtype=torch.bfloat16,
        executions=(GRAPH, EAGER),
    ),
    "cpu": Axes(
        tokens=(512,), ranks=(8,), all_ranks=(8,), dtype=torch.float32, executions=(EAGER,)
    ),
}


def select(
    device: str,
    sets: Collection[str] = (),
    *,
    modes: Collection[str] = (),
    executions: Collection[str] = (),
    tokens: Collection[int] = (),
    ranks: Collection[int] = (),
    dropout: Collection[float] = (),
) -> list[Cell]:
    """The cells of sets of layers, or without sets the representative ones.

    Of an axis that is named only those values: a set takes them in place of its own, the
    representative cells are thinned out by them.
    """
    axes = AXES[device]
    if not sets:
        wanted = {
            "mode": modes, "execution": executions, "m": tokens, "r": ranks, "dropout_p": dropout,
        }  # fmt: skip
        return [
            cell
            for cell in representative(device)
            if all(not values or getattr(cell, name) in values for name, values in wanted.items())
        ]
    cells = {}  # an ordered set: sets overlap
    for name in sets:
        own_tokens = DECODE_TOKENS if name == "decode" else axes.tokens
        own_ranks = axes.all_ranks if name == "all" else axes.ranks
        for layer, m, r, p, mode, execution in itertools.product(
            SETS[name], tokens or own_tokens, ranks or own_ranks, dropout or DROPOUT,
            modes or (FORWARD, BOTH), executions or axes.executions,
        ):  # fmt: skip
            cell = _cell(device, layer, m=m, r=r, dropout_p=p, mode=mode, execution=execution)
            cells[cell] = None
    return list(cells)


def representative(device: str) -> list[Cell]:
    """What ``pytest bench/`` measures unasked, in less than five minutes."""
    return _representative_cpu() if device == "cpu" else _representative_cuda()


def _cell(device: str, layer: Layer, **kwargs) -> Cell:
    return Cell(device=device, dtype=AXES[device].dtype, **{**vars(layer), **kwargs})


def _representative_cpu() -> list[Cell]:
    small, large = Layer(768, 768), Layer(2048, 2048)
    cells = [
        _cell("cpu", layer, m=512, r=8, dropout_p=p, mode=mode)
        for layer in (small, large, GPT2_MEDIUM_QKV)
        for p in DROPOUT
        for mode in (FORWARD, BOTH)
    ]
    return cells + [
        _cell("cpu", layer, m=m, r=8, dropout_p=0.1, mode=BOTH)
        for layer, m in ((small, 16), (small, 128), (small, 2048), (large, 16), (large, 128))
    ]


def _representative_cuda() -> list[Cell]:
    square = Layer(4096, 4096)

    def cell(layer, m=8192, p=0.1, mode=BOTH, execution=GRAPH):
        return _cell("cuda", layer, m=m, r=16, dropout_p=p, mode=mode, execution=execution)

    return [
        *(cell(layer) for layer in (*LLAMA_3_8B, Layer(8192, 8192))),
        cell(square, p=0.0),
        cell(square, mode=FORWARD),
        cell(square, execution=EAGER),
        cell(square, m=512),
        cell(square, m=16),
        cell(square, m=16, execution=EAGER),
        cell(GPT2_MEDIUM_QKV),
        cell(LLAMA_QKV),
    ]
