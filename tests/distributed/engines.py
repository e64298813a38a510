"""A model under DDP or FSDP2 on two processes, and the same steps in one."""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 2
LR = 0.02
ENGINES = ("ddp", "per layer", "per leaf")


def wrap(
    model: nn.Module,
    engine: str,
    layers: Callable,
    *,
    recompute: bool = False,
    dtype: torch.dtype | None = None,
    unused: bool = False,
) -> nn.Module:
    """A copy of model under engine. layers(model): its blocks, which the backward may recompute.

    dtype: in which FSDP2 computes. unused: whether DDP looks for parameters without gradients.
    """
    model = copy.deepcopy(model)
    for layer in layers(model) if recompute else ():
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = forward  # inside of what FSDP2 hooks
    if engine == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=unused)
    options = {}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    for layer in layers(model):
        for leaf in leaves(layer) if engine == "per leaf" else ():
            fully_shard(leaf, **options)
        if not layer._parameters or engine == "per layer":
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have parameters of their own."""
    if module._parameters:
        yield module
    else:
        for child in module.children():
            yield from leaves(child)


def mine(batch: Tensor) -> Tensor:
    """This rank's half of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """In float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(wide), targets.flatten())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, gathered if they are sharded."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(whole(actual[name]), whole(value)), name


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of what trains, gathered, under the names that it has without DDP."""
    return {
        name.removeprefix("module."): whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train(model: nn.Module, loss_of: Callable, batch: Tensor) -> dict[str, Tensor]:
    """Steps of SGD on this rank's half: the losses, means of the ranks, and what was trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, mine(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return {"losses": losses / dist.get_world_size(), **trainable(model)}


def train_alone(
    model: nn.Module,
    loss_of: Callable,
    batch: Tensor,
    dtype: torch.dtype | None = None,
    parts: int = 1,
) -> dict[str, Tensor]:
    """The same in one process, with a copy of model: the batch in parts, parameters as dtype."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], LR)

    def call(*args, **kwargs):
        if dtype is None:
            return model(*args, **kwargs)
        # The casts of one call give their gradients to the parameters in full precision.
        cast = {name: parameter.to(dtype) for name, parameter in parameters.items()}
        return functional_call(model, cast, args, kwargs)

    losses = []
    for _ in range(STEPS):
        total = 0
        for part in batch.chunk(parts):
            loss = loss_of(call, part)
            loss.backward()
            total = total + loss.detach()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= parts
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / parts)
    return {"losses": torch.stack(losses), **trainable(model)}
