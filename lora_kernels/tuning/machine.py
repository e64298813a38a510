"""What a row says of the machine and of the code that was measured on it."""

import platform
import subprocess

import torch

from lora_kernels.tuning import repository

__all__ = ["describe", "gpu_name", "gpu_state"]

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


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
        "driver": gpu_state().get("driver_version") if device == "cuda" else None,
    }


def gpu_name(device: str) -> str | None:
    """The name of the GPU; None if the device is a CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def gpu_state() -> dict[str, str]:
    """Driver, clocks in MHz, temperature in °C and power in W of this process's GPU, as text."""
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = [
        "nvidia-smi",
        f"--id={uuid}",
        f"--query-gpu={','.join(QUERY)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return parse_state(done.stdout)


def parse_state(text: str) -> dict[str, str]:
    """The line that nvidia-smi prints for QUERY, by name."""
    values = [value.strip() for value in text.strip().split(",")]
    return dict(zip(QUERY, values, strict=True))
