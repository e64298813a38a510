"""What a registry entry says: a kernel, its launchers, and what a call of them costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.kernels.config import Config, GemmConfig, Tiles
from lora_kernels.kernels.launch import on_device_of
from lora_kernels.kernels.operands import Operands

__all__ = ["Dims", "Kernel", "Launcher", "dropout_of", "drops", "one_layer"]

Tensors = tuple[Tensor, ...]


class Dims(NamedTuple):
    """x [m, k], w [n, k], rank r; an element of h and dh has four bytes, any other e."""

    m: int
    k: int
    n: int
    r: int
    e: int = 2


@dataclass(frozen=True)
class Launcher:
    """A launcher of a kernel: how it is called, what it computes, and what that costs.

    depends_on: the dimensions that its time depends on; p stands for dropout. call: calls it on
    Operands with a configuration; None takes the table's. formula: the same result in plain
    PyTorch, in a given dtype. config_for: the table's configuration for Operands. flops, moved: the
    FLOPs of one call, and the bytes that it moves. supports: whether it takes such Operands.
    layers: whether it takes Operands of several layers over one x.
    """

    name: str
    depends_on: str
    call: Callable[[Operands, Any], Tensors]  # a configuration of the kernel's own kind
    formula: Callable[[Operands, torch.dtype], Tensors]
    config_for: Callable[[Operands], Config]
    flops: Callable[[Dims], int]
    moved: Callable[[Dims], int]
    supports: Callable[[Operands], bool] = lambda o: True
    layers: bool = False

    def __call__(self, o: Operands, config: Config | None = None) -> Tensors:
        with on_device_of(o.x):
            return self.call(o, config)


@dataclass(frozen=True)
class Kernel:
    """A kernel: its function, the table of its tiles, and what launches it.

    A kernel without launchers is launched by the launchers of other kernels.
    """

    name: str
    function: Callable
    tiles: Tiles | None
    launchers: tuple[Launcher, ...] = ()

    @property
    def is_gemm(self) -> bool:
        """Whether it is a large product, so that its FLOPs count and not only its bytes."""
        return self.tiles is not None and isinstance(self.tiles["other"][0][1], GemmConfig)


def one_layer(o: Operands) -> bool:
    """Whether there is one layer, with one group of y's columns."""
    return o.layers == 1 and o.spec.splits.enabled == (True,)


def drops(o: Operands) -> bool:
    """Whether it is one layer, with dropout."""
    return one_layer(o) and o.spec.dropout_p > 0


def dropout_of(o: Operands) -> tuple[Tensor, float]:
    """The seed and p."""
    return o.seed, o.spec.dropout_p
