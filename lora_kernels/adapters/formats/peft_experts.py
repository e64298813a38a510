"""Factors of experts in PEFT's files (target_parameters).

A stack of weights of E experts is a layer of the adapter, whose path is that of the parameter. This
package keeps lora_A [E, r, in] and lora_B [E, out, r]. PEFT keeps lora_A [E·r, in], expert slowest,
and lora_B [out, r·E], expert fastest. No key names the parameter: PEFT wraps the experts once for
each, the first parameter of the module innermost, and calls what a wrapper wraps base_layer.

PEFT 0.17 to 0.19.0 took in for out if a stack is stored [E, out, in], and 0.19.0 in any case. There
lora_A is [E·r, out] and lora_B [in, r·E], and the update is that of the factors transposed.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from lora_kernels.model.paths import split

__all__ = ["FIXED", "ORIENTED", "Stack", "Stacks", "from_peft", "homes", "is_older", "to_peft"]

ORIENTED = "lora_kernels.experts"  # in the metadata of files whose lora_A is on the side of in
FIXED = "0.19.1"  # from this PEFT on there is one orientation


class Stack(NamedTuple):
    """The stack of weights that a parameter of the model is; transposed: stored [E, in, out]."""

    experts: int
    outputs: int
    inputs: int
    transposed: bool

    @property
    def is_square(self) -> bool:
        """Whether shapes do not tell in from out."""
        return self.inputs == self.outputs


# What target_parameters means in a model, by the paths of the parameters in the model's order.
Stacks = Callable[[list[str]], dict[str, Stack]]


def homes(paths: Iterable[str]) -> dict[str, str]:
    """Path of a parameter -> that of the wrapper which holds its factors in PEFT's keys."""
    by_owner: dict[str, list[str]] = {}
    for path in paths:
        by_owner.setdefault(split(path)[0], []).append(path)
    return {
        path: owner + ".base_layer" * (len(group) - 1 - i)
        for owner, group in by_owner.items()
        for i, path in enumerate(group)
    }


def to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's factors of a stack. Shapes: [E, r, in], [E, out, r] -> [E·r, in], [out, r·E]."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def from_peft(
    a: Tensor, b: Tensor, r: int, stack: Stack, older: bool | None
) -> tuple[Tensor, Tensor] | None:
    """lora_A [E, r, in] and lora_B [E, out, r] of PEFT's, in either orientation; None if in none.

    older: which it is if in is out, so that both fit. None is taken for the newer one.
    """
    count, n, k, _ = stack
    rows = count * r
    newer_fits = a.shape == (rows, k) and b.shape == (n, rows)
    older_fits = a.shape == (rows, n) and b.shape == (k, rows)
    if not (newer_fits or older_fits):
        return None
    a, b = a.unflatten(0, (count, r)), b.unflatten(1, (r, count)).permute(2, 0, 1)
    return (b.mT, a.mT) if older_fits and (older or not newer_fits) else (a, b)


def is_older(stack: Stack, version: str | None) -> bool | None:
    """Whether a file of this version of PEFT has in and out swapped; None if nobody knows.

    PEFT writes its version since 0.18.
    """
    if version is None:
        return False if stack.transposed else None
    numbers = _numbers(version)
    return numbers == (0, 19, 0) if stack.transposed else numbers < _numbers(FIXED)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
