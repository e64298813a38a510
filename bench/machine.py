"""What a row says of the machine and of the code that was measured on it."""

import platform

import torch

from bench import cuda, repository

__all__ = ["describe", "gpu_name"]


def describe(device: str) -> dict:
    """Commit, versions, and the GPU with its capability and driver, None without one."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "commit": repository.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(device),
        "capability": torch.cuda.get_device_capability() if device == "cuda" else None,
        "driver": cuda.gpu_state().get("driver_version") if device == "cuda" else None,
    }


def gpu_name(device: str) -> str | None:
    return torch.cuda.get_device_name() if device == "cuda" else None
