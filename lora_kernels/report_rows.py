"""What report() returns: a row for each LoRA layer, and the rows as text of 100 columns."""

import itertools
import textwrap
from collections import Counter
from typing import NamedTuple

import torch

from lora_kernels.checks import dtype_name

__all__ = ["Report", "Row"]

_WIDTH = 100
_NAME = 36  # the most of a name that a column shows


class Row(NamedTuple):
    """How one LoRA layer would run now."""

    name: str  # in the model
    kind: str  # its class; for one of PEFT's also that of its base layer
    weight: tuple[int, ...]  # shape of the base weight: [N, K] of a linear, else as stored
    ranks: tuple[int, ...]  # of the active adapters
    dtype: torch.dtype | None  # of the base weight; of its products if it is quantised; None: x's
    fused: bool  # whether the forward is lora_linear, lora_shared_linear or lora_grouped_linear
    algorithm: str | None  # of the forward: "fused", "addmm" or "reference"; None if not fused
    reason: str  # of the algorithm, and of the backward's if it is another; or why it is not fused

    @property
    def plan(self) -> str | None:
        """The same as algorithm."""
        return self.algorithm

    @property
    def runs_on(self) -> str:
        """Triton kernels, one PyTorch op (of this package), PyTorch's operators, PEFT's code."""
        if self.fused:
            return "one PyTorch op" if self.algorithm == "reference" else "Triton kernels"
        return "PEFT's code" if self.kind.startswith("peft ") else "PyTorch's operators"

    def as_dict(self) -> dict:
        """The fields and runs_on, as JSON can hold them."""
        dtype = None if self.dtype is None else dtype_name(self.dtype)
        own = {**self._asdict(), "dtype": dtype, "runs_on": self.runs_on}
        return {**own, "weight": list(self.weight), "ranks": list(self.ranks)}


class Report(list[Row]):
    """A list of rows; str() is a table.

    Layers that differ in their place in the model alone are one line of it, unless verbose.
    remark: a sentence about layers that have no row; None without any.
    """

    def __init__(
        self, rows: list[Row], tokens: int, verbose: bool = False, remark: str | None = None
    ):
        super().__init__(rows)
        self.tokens, self.verbose, self.remark = tokens, verbose, remark

    def as_dict(self) -> dict:
        """tokens, how many layers run on what, and every row, as JSON can hold them."""
        return {
            "tokens": self.tokens,
            "runs_on": dict(Counter(row.runs_on for row in self)),
            "layers": [row.as_dict() for row in self],
        }

    def __str__(self) -> str:
        lines = [self._summary()]
        if self.remark is not None:
            lines += textwrap.wrap(
                self.remark, _WIDTH, break_long_words=False, break_on_hyphens=False
            )
        if not self:
            return "\n".join(lines)
        reasons: dict[str, int] = {}
        table = [("layer", "kind", "weight", "rank", "dtype", "runs on", "")]
        for name, row in self._named():
            number = reasons.setdefault(row.reason, len(reasons) + 1)
            algorithm = "" if row.algorithm in (None, "reference") else f", {row.algorithm}"
            table.append(
                (
                    _short(name, _NAME),
                    row.kind,
                    "x".join(map(str, row.weight)),
                    ", ".join(map(str, row.ranks)),
                    "" if row.dtype is None else dtype_name(row.dtype),
                    row.runs_on + algorithm,
                    f"[{number}]",
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        spare = _WIDTH - sum(widths) - 2 * (len(widths) - 1)
        if spare < 0:  # names of classes are the longest
            widths[1] = max(12, widths[1] + spare)
        for cells in table:
            short = [_short(cell, width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join(map(str.ljust, short, widths)).rstrip())
        for reason, number in reasons.items():
            mark = f"[{number}] "
            lines += textwrap.wrap(
                reason, _WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark)
            )
        return "\n".join(lines)

    def _summary(self) -> str:
        count = f"{len(self)} LoRA layer{'s' * (len(self) != 1)}"
        by_place = Counter(row.runs_on for row in self)
        places = ", ".join(f"{number} on {place}" for place, number in by_place.most_common())
        return f"{count}{': ' * bool(places)}{places}; for {self.tokens} tokens"

    def _named(self) -> list[tuple[str, Row]]:
        """Each row with its name; or rows of one kind as one, with how many they are."""
        if self.verbose:
            return [(row.name, row) for row in self]
        groups: dict[tuple, list[Row]] = {}
        for row in self:
            groups.setdefault((_last(row.name), *row[1:]), []).append(row)
        return [
            (rows[0].name if len(rows) == 1 else f"{_last(rows[0].name)} x{len(rows)}", rows[0])
            for rows in groups.values()
        ]


def _last(name: str) -> str:
    """The last part of a path that is a name and not a number, with what follows it."""
    parts = name.split(".")
    named = [index for index, part in enumerate(parts) if not part.isdecimal()]
    start = named[-1] if named else 0
    numbers = itertools.repeat("*", len(parts) - 1 - start)
    return ".".join([parts[start] if named else "*", *numbers])


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]
