"""--device, for programs whose device transformers or accelerate choose."""

import os

from examples.errors import InputError

__all__ = ["is_cpu", "see_only"]


def see_only(name: str) -> None:
    """Lets this process see the one GPU that cuda:N names, before CUDA has been asked for any.

    Raises: InputError for a number that no GPU has, and where a launcher gives GPUs to processes.
    """
    kind, _, index = name.partition(":")
    if not index:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = seen.split(",") if seen else None
    if kind != "cuda" or not index.isdecimal() or (ids and int(index) >= len(ids)):
        raise InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if "LOCAL_RANK" in os.environ:
        raise InputError(f"--device {name}: each process has a GPU of its own: give cuda")
    os.environ["CUDA_VISIBLE_DEVICES"] = ids[int(index)] if ids else index


def is_cpu(name: str) -> bool:
    """Whether --device is the CPU. Raises: InputError for a device that is not there."""
    import torch

    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    kind = name.partition(":")[0]
    if kind not in ("auto", "cpu", found):
        raise InputError(f"--device {name}: there is {found or 'no GPU'} here")
    return kind == "cpu" or not found
