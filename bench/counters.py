"""What a step costs besides time: saved and peak memory, launches, Python's own time."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lora_kernels.tuning.stopwatch import Step

__all__ = ["count", "kernels", "peak_bytes", "saved_bytes"]

CALLS = 20


def count(module: nn.Module, x: Tensor, step: Step) -> dict:
    """The counters of a row. Of a CPU only the saved bytes are known.

    saved_bytes: kept from forward to backward beyond x and the parameters. peak_bytes: allocated by
    a step at its highest, beyond what lives before it. kernels: microseconds and launches by name.
    cpu_us: what Python takes to issue a step, by the median.
    """
    counters = {"saved_bytes": saved_bytes(module, x)}
    counters |= dict.fromkeys(("peak_bytes", "launches", "kernels", "cpu_us"))
    if x.is_cuda:
        counters |= {"peak_bytes": peak_bytes(step), "cpu_us": _cpu_microseconds(step)}
        step.prepare()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step.call()
            torch.cuda.synchronize()
        counters["kernels"] = kernels(profiler.events())
        counters["launches"] = sum(each["launches"] for each in counters["kernels"].values())
    return counters


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the memory that the forward keeps for the backward, parameters and x left out."""
    weights = (x, *module.parameters(), *module.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)  # holds what is saved: no memory is used twice meanwhile
    del y
    return sum(kept.values())


def peak_bytes(step: Step) -> int:
    """Bytes allocated on the GPU at the height of a step, beyond those allocated before it."""
    step.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(events: Iterable) -> dict[str, dict]:
    """Launches and microseconds of everything that ran on the GPU, copies included, by name."""
    by_name: dict[str, dict] = defaultdict(lambda: {"launches": 0, "us": 0.0})
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            by_name[event.name]["launches"] += 1
            by_name[event.name]["us"] += event.time_range.elapsed_us()
    return dict(by_name)


def _cpu_microseconds(step: Step) -> float:
    times = []
    for _ in range(CALLS):
        step.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6
