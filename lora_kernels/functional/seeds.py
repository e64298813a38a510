"""Seeds of dropout masks: one that the caller gives, or one drawn for this call and rank."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import checks
from lora_kernels.distributed import rank_of

__all__ = ["draw_like", "draw_seeds", "is_alone", "like_drawn", "seeds_for"]

GroupMember: Any = getattr(torch.distributed, "GroupMember", None)  # None: built without


def seeds_for(
    layer: str | nn.Module, x: Tensor, dropout_p: float, seed: Tensor | None, count: int = 1
) -> Tensor | None:
    """The seeds of count masks: seed, or drawn ones if it is None; None without dropout."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return draw_seeds(count, x.device)
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"{checks.layer_name(layer)}: seed must be a torch.Tensor, got {type(seed).__name__}"
        )
    if seed.dtype != torch.int64 or seed.numel() != count or seed.device != x.device:
        elements = "one element" if count == 1 else f"{count} elements"
        raise ValueError(
            f"{checks.layer_name(layer)}: seed must be an int64 tensor of {elements} on "
            f"{x.device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed.reshape(count)


@functools.cache
def like_drawn(device: torch.device) -> Tensor:
    """A tensor of the kind that draw_seeds(1, device) returns."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds from PyTorch's generator; under torch.distributed, out of this rank's share of int64.

    After set_seed(42) on every rank, all generators have the same state and draw the same numbers;
    nn.Dropout then drops the same elements on all ranks. Seeds out of disjoint ranges give every
    rank its own mask. The rank only moves the bounds of the draw. So the recomputation of
    checkpointing, CUDA graph capture and torch.compile see the one operation that they see in a
    single process.

    Ranks that compute the same activations, as under tensor parallelism outside of what it shards,
    need the same mask: there, the caller draws one seed for all of them and passes it.
    """
    return torch.randint(*_bounds(), (count,), dtype=torch.int64, device=device)


def draw_like(seeds: Tensor) -> Tensor:
    """draw_seeds for as many, on the same device, in eager mode: half of its cost to the host."""
    return torch.empty_like(seeds).random_(*_bounds())


def _bounds() -> tuple[int, int]:
    """The least seed of this rank, and what is above the greatest."""
    rank, ranks = rank_of()
    share = 2**64 // ranks
    low = -(2**63) + rank * share
    return low, low + share - 1


def is_alone() -> bool:
    """Whether torch.distributed has no other ranks; asked in every call."""
    return GroupMember is None or GroupMember.WORLD is None or rank_of()[1] == 1
