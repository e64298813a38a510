"""The ranks of torch.distributed, and parameters that FSDP2 (fully_shard) has sharded: DTensors."""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "distribute_like", "full_tensor", "is_dtensor", "is_managed", "is_sharded_alone", "rank_of",
]  # fmt: skip


def rank_of() -> tuple[int, int]:
    """This process's rank under torch.distributed, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Whether tensor holds this rank's shard of a larger one."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensors yet
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, for which every rank must call this; other tensors unchanged."""
    if not is_dtensor(tensor):
        return tensor
    on_mesh = tensor.to(tensor.device_mesh.device_type)  # from the CPU, if offloaded
    return on_mesh.full_tensor()  # type: ignore[attr-defined]  # to() gives a DTensor, too


def distribute_like(whole: Tensor, like: Tensor) -> Tensor:
    """whole, equal on every rank, distributed as like is; unchanged if like is not a DTensor."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements).to(like.device)


def is_sharded_alone(module: nn.Module) -> bool:
    """Whether fully_shard was applied to module itself, so that its call gathers its parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_managed(module: nn.Module) -> bool:
    """Whether fully_shard manages module's own parameters, gathered at the moment or not."""
    return getattr(module, "_is_fsdp_managed_module", False)  # what TorchDynamo asks, too
