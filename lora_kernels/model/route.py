"""route(): which adapter each sample of a batch takes; adapter_parameters: what one trains."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.functional.seeds import draw_seeds
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.multi_linear import MultiLoRALinear
from lora_kernels.layers.routing import RoutedLayer, Segments, mixed
from lora_kernels.model.paths import lora_layers

__all__ = [
    "adapter_names",
    "adapter_parameters",
    "check_adapter_exists",
    "multi_layers",
    "one_adapter",
    "route",
]


def multi_layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """The layers of model that have several adapters, by path."""
    return {path: m for path, m in lora_layers(model) if isinstance(m, MultiLoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of model's layers, in the order in which they came."""
    return list(dict.fromkeys(name for m in multi_layers(model).values() for name in m.adapters))


def check_adapter_exists(function: str, model: nn.Module, *names) -> None:
    """Every one of names is an adapter. Raises: ValueError that names those there are."""
    known = adapter_names(model)
    if not known:
        raise ValueError(
            f"{function}: {type(model).__name__} has no named adapters: apply_lora(model, "
            f"adapters={{...}}) makes them"
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"{function}: no adapter is called {name!r}; the model has "
                f"{', '.join(map(repr, known))}"
            )


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The parameters of one adapter, for its optimizer: lora_A and lora_B of every layer.

    Raises: ValueError for a name that no adapter has.
    """
    check_adapter_exists("adapter_parameters", model, adapter)
    layers = multi_layers(model).values()
    return [factor for m in layers if adapter in m.adapters for factor in m.factors(adapter)]


def one_adapter(function: str, model: nn.Module, adapter: str | None) -> dict[str, LoRALinear]:
    """A layer for each that has the adapter, by path, with its parameters; {} if adapter is None.

    Raises: ValueError if the model has named adapters and adapter is none of them.
    """
    if adapter is None and adapter_names(model):
        raise ValueError(
            f"{function}: give adapter, one of {', '.join(map(repr, adapter_names(model)))}"
        )
    if adapter is None:
        return {}
    check_adapter_exists(function, model, adapter)
    layers = multi_layers(model).items()
    return {path: m.alone(adapter) for path, m in layers if adapter in m.adapters}


@contextlib.contextmanager
def route(
    model: nn.Module,
    names: Sequence[str | None],
    lengths: Sequence[int] | None = None,
    *,
    seeds: Mapping[str, int | torch.Generator] | None = None,
) -> Iterator[None]:
    """``with route(model, names):`` says which adapter each sample of a batch takes.

    names: the adapter of each sample, None for the base alone. A sample has as many rows of x as
    every other: x is [samples, ..., K], or its first dimension is a multiple of samples. For
    samples packed one behind another, lengths are their rows. Samples of one adapter need not lie
    together.

    Forward and backward belong in one block, if checkpointing is used: its second forward, in the
    backward, needs the route of the first, and raises a RuntimeError without it. It must restore
    the state of PyTorch's generator (preserve_rng_state=True, as by default). Every other backward
    may come later. Routes nest, and threads may route one model at the same time.

    An adapter that is not in names gets no gradient (None), so that its optimizer leaves it alone,
    weight decay included. Under DistributedDataParallel adapters may be absent on one rank: pass
    find_unused_parameters=True. A layer that fully_shard has sharded gives all adapters gradients,
    zeros to those absent: step the optimizers of those alone that were present on some rank.

    seeds: for an adapter the seed of this route's dropout masks: an integer, such as the step, or a
    torch.Generator on the CPU that one number is drawn from, if the adapter is present. Whoever
    resumes a training saves the generator's state. The masks depend on that seed, the path of a
    layer in model, the number of its call in the route, the rank of the process, and the rows of
    the adapter alone: not on other adapters. Without a seed it is drawn from PyTorch's generator.

    So a job that trains in a mix computes what it computes alone. On a CPU it does so bit for bit
    if its rows lie together and count a multiple of 16: for a few rows less, BLAS adds up the
    product with the base weight in another order.

    torch.compile: enter the route outside of the compiled function. Each set of adapters that are
    present compiles once. A layer that is called twice in one route drops the same elements in
    both calls, and a backward that recomputes it has to run in its own route, which is not checked.

    Raises: ValueError if the model has no named adapters, for a name that no adapter has, and for
    names, lengths or seeds that do not fit together; a layer raises ValueError for an x that they
    do not fit, and RuntimeError if it is called without a route.
    """
    _check_batch(names, lengths)
    seeds = {} if seeds is None else seeds
    if not isinstance(seeds, Mapping):
        raise ValueError(f"route: seeds must map names of adapters to seeds, got {seeds!r}")
    present = list(dict.fromkeys(name for name in names if name is not None))
    check_adapter_exists("route", model, *present, *seeds)
    seed_of = _seeds(present, seeds)
    cache: dict[tuple, tuple[Segments, Tensor]] = {}
    entered: list[tuple[MultiLoRALinear, RoutedLayer]] = []
    try:
        for path, layer in multi_layers(model).items():
            every = distributed.is_managed(layer)
            own = tuple(name for name in layer.adapters if every or name in seed_of)
            key = own, layer.weight.device
            if key not in cache:
                values = [seed_of.get(name, 0) for name in own]
                tensor = torch.tensor(values, dtype=torch.int64, device=layer.weight.device)
                cache[key] = Segments(names, lengths, *key), tensor
            segments, of_groups = cache[key]
            drops = any(layer.adapters[name].lora_dropout for name in own)
            routed = RoutedLayer(segments, of_groups ^ _number_of(path) if drops else None)
            layer._active.enter(routed)
            entered.append((layer, routed))
        yield
    finally:
        for layer, routed in entered:
            layer._active.leave(routed)


def _check_batch(names, lengths) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"route: names must be a list of at least one name, or None, for each sample, got "
            f"{names!r}"
        )
    if lengths is None:
        return
    whole = isinstance(lengths, Sequence) and all(
        isinstance(length, int) and not isinstance(length, bool) and length >= 0
        for length in lengths
    )
    if not whole or len(lengths) != len(names):
        raise ValueError(
            f"route: lengths must be {len(names)} integers >= 0, one for each name, got {lengths!r}"
        )


def _seeds(present: Sequence[str], given: Mapping[str, int | torch.Generator]) -> dict[str, int]:
    """The seed of each adapter that is present, another one on every rank."""
    for name, seed in given.items():
        fits = isinstance(seed, int) and not isinstance(seed, bool)
        if not fits and not (isinstance(seed, torch.Generator) and seed.device.type == "cpu"):
            raise ValueError(
                f"route: seeds[{name!r}] must be an integer or a torch.Generator on the CPU, got "
                f"{seed!r}"
            )
    rank, _ = distributed.rank_of()
    drawn = iter(draw_seeds(len(present), torch.device("cpu")).tolist())
    seeds = {}
    for name, own in zip(present, drawn, strict=True):
        told = given.get(name)
        if isinstance(told, torch.Generator):
            told = int(torch.randint(2**62, (), generator=told))
        seeds[name] = own if told is None else mixed(told, rank)
    return seeds


def _number_of(path: str) -> int:
    """An int64 that tells the paths of layers apart."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
