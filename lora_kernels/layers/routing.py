"""Which rows of a batch take which adapter: what route() hands to the layers of a model.

A route holds from its ``with`` to the end of the block. In it every layer has a RoutedLayer, which
ActiveRoutes finds for a call.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import checks

__all__ = ["ActiveRoutes", "RoutedLayer", "Segments", "mixed"]

_MASK = 2**64 - 1
_LOCK = threading.Lock()


def mixed(*values: int) -> int:
    """A hash of integers, as an int64. Source: the steps of splitmix64."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


class Segments:
    """Runs of samples with one adapter, for all layers that have the same adapters.

    present: the names of the groups. ends, groups: as lora_grouped_linear takes them; a sample of
    another adapter has group -1. ends count rows if lengths are given, samples if not.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        lengths: Sequence[int] | None,
        present: tuple[str, ...],
        device: torch.device,
    ):
        numbers: dict[str | None, int] = {name: g for g, name in enumerate(present)}
        ends: list[int] = []
        groups: list[int] = []
        end = 0
        counts = [1] * len(names) if lengths is None else lengths
        for name, length in zip(names, counts, strict=True):
            group, end = numbers.get(name, -1), end + length
            if groups and groups[-1] == group:
                ends[-1] = end
            else:
                ends.append(end)
                groups.append(group)
        self.present, self.total, self.counts_rows = present, end, lengths is not None
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device)
        self.groups = torch.tensor(groups, dtype=torch.int32, device=device)
        self._ends_by_rows: dict[int, Tensor] = {1: self.ends}

    def ends_in(self, layer: nn.Module, x: Tensor) -> Tensor:
        """ends in rows of x. Raises: ValueError if x has no whole rows for each sample."""
        rows, first = x.shape[:-1].numel(), x.shape[0] if x.dim() > 1 else 1
        if self.counts_rows:
            if rows == self.total:
                return self.ends
            problem = f"have as many rows as the lengths given to route() sum to, {self.total}"
        elif first % self.total == 0:
            each = rows // self.total
            if torch.compiler.is_compiling():
                return self.ends * each
            if each not in self._ends_by_rows:
                self._ends_by_rows[each] = self.ends * each
            return self._ends_by_rows[each]
        else:
            problem = (
                f"have a first dimension that holds the {self.total} samples given to route(), or "
                f"a multiple of them (pass lengths for samples packed in one row)"
            )
        raise ValueError(f"{checks.layer_name(layer)}: x must {problem}, got {list(x.shape)}")


class RoutedLayer:
    """A route as one layer sees it.

    seeds: an int64 for each group, of the layer's first call in the route; None without dropout.
    calls: the number of each call of the layer in the route, by a draw of PyTorch's generator.
    """

    def __init__(self, segments: Segments, seeds: Tensor | None):
        self.segments, self.seeds = segments, seeds
        self.calls: dict[int, int] = {}

    def seeds_of(self, call: int) -> Tensor | None:
        """The seeds of another call of the layer in the same route."""
        return self.seeds if call == 0 or self.seeds is None else self.seeds ^ mixed(call)


class _Entry(NamedTuple):
    thread: int
    routed: RoutedLayer


class ActiveRoutes:
    """The routes that one layer is in: one in another, or of several threads.

    A forward takes the innermost route of its thread. Checkpointing's second forward runs in the
    backward, maybe on another thread, and takes the route of the first. It is known by a draw of
    PyTorch's generator, whose state checkpointing restores: both forwards draw the same number. A
    compiled forward cannot look at such a draw, and takes the newest route.

    A copy or a pickle is in no route.
    """

    def __init__(self) -> None:
        self.entries: tuple[_Entry, ...] = ()

    def __deepcopy__(self, memo: dict) -> "ActiveRoutes":
        return ActiveRoutes()

    def __reduce__(self):
        return ActiveRoutes, ()

    def enter(self, routed: RoutedLayer) -> None:
        """From now on the innermost route of this thread."""
        with _LOCK:
            self.entries = (*self.entries, _Entry(threading.get_ident(), routed))

    def leave(self, routed: RoutedLayer) -> None:
        """The end of a route."""
        with _LOCK:
            self.entries = tuple(entry for entry in self.entries if entry.routed is not routed)

    def current(self, layer: nn.Module) -> tuple[RoutedLayer, int]:
        """The route of a call of layer, and the number of this call in it.

        Raises: RuntimeError that names route() if there is none, or not that of the first forward.
        """
        entries = self.entries
        if torch.compiler.is_compiling():
            if entries:
                return entries[-1].routed, 0
        elif torch._C._current_graph_task_id() != -1:  # in a backward
            draw = _draw()
            for entry in reversed(entries):
                if draw in entry.routed.calls:
                    return entry.routed, entry.routed.calls[draw]
            raise RuntimeError(
                f"{checks.layer_name(layer)}: the backward computes this layer again, as "
                f"checkpointing does, and is not in the route() of the layer's forward: call "
                f"backward() in the same `with route(...)`, and leave preserve_rng_state=True in "
                f"checkpoint()"
            )
        else:
            thread = threading.get_ident()
            for entry in reversed(entries):
                if entry.thread == thread:
                    calls = entry.routed.calls
                    return entry.routed, calls.setdefault(_draw(), len(calls))
        raise RuntimeError(
            f"{checks.layer_name(layer)}: has several adapters, and nothing says which rows take "
            f"which: call the model in `with lora_kernels.route(model, names):`, with the adapter "
            f"of each sample"
        )


def _draw() -> int:
    return int(torch.randint(2**62, (), device="cpu"))
