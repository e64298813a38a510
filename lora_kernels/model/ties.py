"""Tied weights that come apart in a state dict with merged weights, for a warning."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.model.paths import join

__all__ = ["parted_ties"]


def parted_ties(
    function: str,
    modules: Iterable[tuple[str, nn.Module]],
    state: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    renamed: Mapping[str, str],
) -> str | None:
    """The warning of function for parameters whose entries in state differ with merged over it.

    modules: those of the model with the paths that keys of state begin with, a module that is there
    twice under both. renamed: other names of keys, for the user. None if there are no such entries.
    """
    holders: dict[int, list[str]] = {}
    for path, module in modules:
        for name, parameter in module._parameters.items():
            key = join(path, name)
            if parameter is not None and key in state:
                holders.setdefault(id(parameter), []).append(key)
    parted = []
    for keys in holders.values():
        if any(key in merged for key in keys):
            first, *others = (merged.get(key, state[key]) for key in keys)
            if any(_differ(first, other) for other in others):
                parted.append(" and ".join(renamed.get(key, key) for key in keys))
    if not parted:
        return None
    return (
        f"{function}: these entries are one tied weight in the model and differ in the dict, "
        f"because LoRA changes one of them, or each otherwise: {'; '.join(parted)}. In a model "
        f"that ties them one overwrites the other: load the dict into a model that does not"
    )


def _differ(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return False
    if one.is_meta or other.is_meta or distributed.is_dtensor(one):
        return True
    return not torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
