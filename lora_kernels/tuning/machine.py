"""What a row says of the machine and of the code that was measured on it."""

import platform
import subprocess

import torch

from lora_kernels.dispatch.algorithm import interpreted
from lora_kernels.tuning import repository

__all__ = ["NO_KERNELS", "describe", "device_of_kernels", "gpu_name", "gpu_state"]

NO_KERNELS = "there is no GPU; without one the kernels run under TRITON_INTERPRET=1 only"

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def device_of_kernels() -> torch.device | None:
    """Where this process runs the kernels: a GPU, or a CPU if it interprets them; or nowhere."""
    if interpreted():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


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
