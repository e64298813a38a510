"""The values that travel together: LoraSpec, DoraSpec, OutputSplits, Needs.

They hold no tensors and are compared and hashed by value. torch.compile traces them through an
autograd Function without recompiling.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DoraNeeds", "DoraSpec", "Group", "GroupedSpec", "LoraSpec", "Needs", "OutputSplits",
]  # fmt: skip


class Group(NamedTuple):
    """Where an enabled group of output columns lies, as slices.

    columns: of y [M, N]; rows: of lora_B; ranks: rows of lora_A, which are columns of h.
    """

    columns: slice
    rows: slice
    ranks: slice


@dataclass(frozen=True)
class OutputSplits:
    """Output columns in groups: how wide each group is, and whether it has an update.

    E is the number of enabled groups. lora_A has E·r rows. lora_B has a row for each column of an
    enabled group.
    """

    sizes: tuple[int, ...]
    enabled: tuple[bool, ...]

    @classmethod
    def whole(cls, columns: int) -> "OutputSplits":
        """One enabled group of all columns, as a LoRALinear has it."""
        return cls((columns,), (True,))

    @classmethod
    def of(
        cls,
        columns: int,
        enabled: Sequence[bool],
        sizes: Sequence[int] | None = None,
        *,
        owner: str,
        names: tuple[str, str] = ("enable_lora", "out_splits"),
    ) -> "OutputSplits":
        """The groups, after a check that they fit together; sizes=None makes them equal.

        owner: what an error begins with: a layer, a function, or a file and the place in it.
        names: what an error calls enabled and sizes.
        Raises: ValueError if enabled is not a list or tuple of at least one bool, if its length
        does not divide columns and sizes is None, or if sizes are not len(enabled) integers >= 1
        that sum to columns.
        """
        flags, parts = names
        if (
            not isinstance(enabled, (list, tuple))
            or not enabled
            or not all(isinstance(flag, bool) for flag in enabled)
        ):
            raise ValueError(
                f"{owner}: {flags} must be a list of at least one bool, got {enabled!r}"
            )
        count = len(enabled)
        if sizes is None:
            if columns % count:
                raise ValueError(
                    f"{owner}: the length of {flags} must divide the {columns} output columns, "
                    f"got {flags}={list(enabled)}; give {parts} for groups of unequal size"
                )
            return cls((columns // count,) * count, tuple(enabled))
        if isinstance(sizes, (list, tuple)):
            splits = cls(tuple(sizes), tuple(enabled))
            if splits.fits(columns):
                return splits
        raise ValueError(
            f"{owner}: {parts} must be a list of {count} integers >= 1, one for each entry of "
            f"{flags}, that sum to the {columns} output columns, got {sizes!r}"
        )

    def fits(self, columns: int) -> bool:
        """Whether the groups are as many as the flags, of sizes >= 1 that sum to columns."""
        return (
            len(self.sizes) == len(self.enabled)
            and all(map(_is_size, self.sizes))
            and sum(self.sizes) == columns
        )

    @property
    def columns(self) -> int:
        """N, over all groups."""
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        """Rows of lora_B: the columns of the enabled groups."""
        if self.enabled == (True,):  # nearly always, and asked for in every call
            return self.sizes[0]
        return sum(size for size, on in zip(self.sizes, self.enabled, strict=True) if on)

    @property
    def count(self) -> int:
        """E, the number of enabled groups."""
        return sum(self.enabled)

    def groups(self, r: int) -> Iterator[Group]:
        """The enabled groups in order, for factors of rank r."""
        column = row = rank = 0
        for size, enabled in zip(self.sizes, self.enabled, strict=True):
            if enabled:
                yield Group(
                    slice(column, column + size), slice(row, row + size), slice(rank, rank + r)
                )
                row, rank = row + size, rank + r
            column += size


def _is_size(size) -> bool:
    integer = isinstance(size, (int, torch.SymInt, Integral))  # NumPy's are the last
    return integer and not isinstance(size, bool) and bool(size >= 1)


@dataclass(frozen=True)
class LoraSpec:
    """The values of an update that are not tensors.

    scaling: the factor of h·lora_Bᵀ. dropout_p: the probability in [0, 1) that an element of x is
    dropped before lora_A. splits: the groups of output columns. narrow: whether a product may round
    the factors to x's dtype, as autocast does.
    """

    scaling: float
    dropout_p: float
    splits: OutputSplits
    narrow: bool = False


@functools.lru_cache(1024, typed=True)  # 1 and 1.0 are not the same to a kernel
def linear_spec(scaling: float, dropout_p: float, columns: int) -> LoraSpec:
    """The values of a plain layer's update, which asks for the same ones in every call."""
    return LoraSpec(scaling, dropout_p, OutputSplits.whole(columns))


@dataclass(frozen=True)
class DoraSpec(LoraSpec):
    """The values of an update with a magnitude that are not tensors; splits has one group.

    low_rank_only: whether dropout acts on the low-rank part alone, see reference/dora.py.
    """

    low_rank_only: bool = False

    @property
    def drops_product(self) -> bool:
        """Whether the product with the base weight sees a dropped-out x, too."""
        return self.dropout_p > 0 and not self.low_rank_only


@dataclass(frozen=True)
class GroupedSpec:
    """The values of G updates that are not tensors: one for each, or a single one for all.

    scalings: the factor of h·b_gᵀ. dropout_ps: the probability in [0, 1) that an element of x is
    dropped before a_g. narrow: as in LoraSpec.
    """

    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    narrow: bool = False

    def scaling(self, group: int) -> float:
        """That of one group."""
        return self.scalings[group if len(self.scalings) > 1 else 0]

    def dropout_p(self, group: int) -> float:
        """That of one group."""
        return self.dropout_ps[group if len(self.dropout_ps) > 1 else 0]

    @property
    def drops(self) -> bool:
        """Whether a group has dropout."""
        return any(self.dropout_ps)


class Needs(NamedTuple):
    """Which operands of a LoRA product need a gradient."""

    x: bool = False
    w: bool = False
    a: bool = False
    b: bool = False
    bias: bool = False

    def spread(self, grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of the needed operands, in order, with None in the places of the others."""
        return _spread(self, grads)


class DoraNeeds(NamedTuple):
    """Which operands of a LoRA product with a magnitude need a gradient."""

    x: bool = False
    w: bool = False
    a: bool = False
    b: bool = False
    bias: bool = False
    magnitude: bool = False

    def spread(self, grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """As Needs has it."""
        return _spread(self, grads)


def _spread(needs: Iterable[bool], grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    following = iter(grads)
    return tuple([next(following) if needed else None for needed in needs])
