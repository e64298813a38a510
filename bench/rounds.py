"""Steps, rounds that call each once, and what a forward keeps, for benchmarks that print tables."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kernels import patch_peft, unpatch_peft

__all__ = ["Subject", "kept_bytes", "median_ratio", "patched", "rounds", "training_step"]


@dataclass(frozen=True)
class Subject:
    """What is timed: call, in a context; prepare comes first and is not timed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def training_step(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    dy: Tensor | None = None,
) -> Subject:
    """A forward and backward of a layer, for its gradients anew; dy: None for the sum's."""

    def step() -> None:
        y = layer(*inputs)
        if dy is None:
            y.sum().backward()
        else:
            y.backward(dy)

    def clear() -> None:
        for tensor in (*inputs, *layer.parameters()):
            tensor.grad = None

    return Subject(step, clear, context)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """PEFT's layers run this package's operations."""
    patch_peft()
    try:
        yield
    finally:
        unpatch_peft()


def rounds(
    subjects: Mapping[str, Subject], count: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds by name, a value for each round; the order is drawn anew in each. One warms up.

    clock: time.process_time takes no account of other processes on the machine, but misses what a
    GPU does.
    """
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(count + 1):
        for name in random.sample(list(subjects), len(subjects)):
            subject = subjects[name]
            subject.prepare()
            with subject.context():
                _wait()
                start = clock()
                subject.call()
                _wait()
                elapsed = clock() - start
            if turn > 0:
                samples[name].append(elapsed)
    return samples


def median_ratio(samples: Mapping[str, list[float]], name: str, other: str) -> float:
    """The median over rounds of the ratio of two times within a round."""
    pairs = zip(samples[name], samples[other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def kept_bytes(forward: Callable[[], Tensor], known: Collection[Tensor]) -> int:
    """Bytes of storages that autograd saves in a forward, without those of known tensors.

    Also those that an autograd Function of Python keeps past PyTorch's hooks, as its attributes.
    """
    skipped, found, alive = set(), {}, []
    for tensor in known:
        skipped |= {part.untyped_storage().data_ptr() for part in _parts(tensor)}

    def keep(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in skipped:
                found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or its address could serve another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor):
                    keep(part)
    return sum(found.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: a quantiser's class holds several."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten(tensor)[0] for part in _parts(getattr(tensor, name))]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
