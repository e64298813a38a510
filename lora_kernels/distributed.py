"""Parameters that torch.distributed shards (FSDP2's fully_shard): as DTensors."""

import sys

from torch import Tensor, nn

__all__ = ["distribute_like", "full_tensor", "is_dtensor", "is_managed", "is_sharded_alone"]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether tensor holds this rank's shard of a larger one."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, a collective that every rank takes part in; others as they are."""
    if not is_dtensor(tensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # offloaded ones lie elsewhere


def distribute_like(whole: Tensor, like: Tensor) -> Tensor:
    """whole, equal on every rank, laid out as like: a DTensor where that is one."""
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
    """Whether fully_shard has taken over module's own parameters, gathered at the moment or not."""
    return getattr(module, "_is_fsdp_managed_module", False)  # as TorchDynamo tells them
