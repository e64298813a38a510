"""The processes that train together, as torchrun starts them; without it there is one, rank 0."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["count", "is_first", "local", "mean", "parallel", "process_group", "rank", "share"]


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun started can reach each other; a group of them stays."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local() -> int:
    """The number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    return rank() == 0


def parallel(model: nn.Module) -> nn.Module:
    """model, whose backward gives every rank the mean of all ranks' gradients."""
    return DistributedDataParallel(model) if count() > 1 else model


def share(batch: list) -> tuple[list, float]:
    """This rank's rows of a batch, and the weight of their mean loss.

    The mean of the weighted losses of all ranks is the mean loss of the batch. A rank for which no
    row is left computes the first one with weight 0, since the others wait for its gradients.
    """
    rows = batch[rank() :: count()]
    return rows or batch[:1], len(rows) * count() / len(batch)


def mean(value: Tensor) -> Tensor:
    """The mean of value over all ranks, on each of them."""
    if count() > 1:
        dist.all_reduce(value)
    return value / count()
