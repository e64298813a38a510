"""Whether something else holds a layer's base weight, which then must not be merged in place.

A module does not know who else holds its parameter. So reference counts are asked first, because
they cost little. Only if they leave the question open are all live objects searched.
"""

import gc
import sys

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_kernels import distributed

__all__ = ["is_tied"]


def is_tied(owner: nn.Module) -> bool:
    """Whether something besides owner holds owner's weight, or a part of its memory.

    It may be another module. It may be FSDP, which gathers the weight for a forward and drops it
    afterwards. A weight on the meta device is never tied.
    """
    if owner._parameters["weight"].is_meta:
        return False
    if distributed.is_managed(owner) or distributed.is_dtensor(owner._parameters["weight"]):
        return True
    references, storage_uses = _reference_counts(owner)  # before a local name adds to them
    weight = owner._parameters["weight"]
    if storage_uses == _UNSHARED[1] and (
        references == _UNSHARED[0] or not _in_another_dict(weight, owner)
    ):
        return False
    return _held_elsewhere(weight, owner)


def _reference_counts(owner: nn.Module) -> tuple[int, int]:
    """How often owner's weight is referred to: the Python object, and the storage under it."""
    return (
        sys.getrefcount(owner._parameters["weight"]),
        torch._C._storage_Use_Count(owner._parameters["weight"].untyped_storage()._cdata),
    )


# The counts of a weight that nobody shares, read off one: they depend on the Python version.
_UNSHARED = _reference_counts(nn.Linear(1, 1))


def _in_another_dict(weight: Tensor, owner: nn.Module) -> bool:
    """Whether a dict other than owner's, as modules keep their parameters in, refers to weight."""
    return any(
        isinstance(holder, dict) and holder is not owner._parameters
        for holder in gc.get_referrers(weight)
    )


def _held_elsewhere(weight: Tensor, owner: nn.Module) -> bool:
    """Whether a module other than owner has a parameter or buffer that overlaps weight."""
    start, end = _extent(weight)
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), nn.Module) or candidate is owner:
            continue
        held = candidate.__dict__
        for tensor in (*held.get("_parameters", {}).values(), *held.get("_buffers", {}).values()):
            if tensor is None or is_lazy(tensor) or tensor.device != weight.device:
                continue
            if tensor.layout is not torch.strided:
                continue
            other_start, other_end = _extent(tensor)
            if other_start < end and start < other_end:
                return True
    return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a contiguous tensor covers."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
