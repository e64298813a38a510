"""A GPU that is not there: Triton's own driver over a stand-in libcuda, which driver.c is.

Kernels are compiled, and launched on CPU tensors by Triton's real launchers; nothing is computed.
Each launch's grid and shared memory and each tensor map is checked. What a launch costs the host is
what it costs beside a GPU, without the time of NVIDIA's driver. For processes that have not
imported triton with TRITON_INTERPRET=1.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

__all__ = ["DEVICES", "Launch", "launches", "running_on", "why_not"]


class _Device(NamedTuple):
    """shared: the most memory of a program that its threads share, in bytes."""

    capability: int
    num_sms: int
    shared: int


DEVICES = {
    "sm_80": _Device(80, 108, 166912),
    "sm_86": _Device(86, 82, 101376),
    "sm_89": _Device(89, 128, 101376),
    "sm_90": _Device(90, 132, 232448),
    "sm_100": _Device(100, 148, 232448),
    "sm_120": _Device(120, 170, 101376),
}


class Launch(NamedTuple):
    """A launch as the driver saw it; arguments are hex digits of their bytes, highest first."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    arguments: tuple[str, ...]


def why_not() -> str | None:
    """Why this machine cannot build the stand-in, in words; None if it can."""
    if os.name != "posix":
        return "the stand-in driver needs a POSIX system"
    if _compiler() is None:
        return "there is no C compiler"
    try:
        import triton.backends.nvidia  # noqa: F401
    except ImportError:
        return "triton has no backend for NVIDIA here"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


_TABLED = ("sm_80", "sm_90", "sm_100")  # the targets that have tiles of their own
_library: ctypes.CDLL | None = None


def _load() -> ctypes.CDLL:
    """The stand-in, built and loaded under the name by which everyone looks for NVIDIA's."""
    global _library
    if _library is None:
        from triton.backends import nvidia

        folder = Path(tempfile.mkdtemp(prefix="standin-"))
        include = Path(nvidia.__path__[0]) / "include"
        library, source = folder / "libcuda.so.1", Path(__file__).with_name("driver.c")
        flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        subprocess.run([_compiler(), *flags, source, "-o", library], check=True)
        (folder / "libcuda.so").symlink_to(library)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("standin_written", "standin_faults"):
            getattr(_library, name).restype = ctypes.c_char_p
    return _library


@contextlib.contextmanager
def running_on(target: str) -> Iterator[None]:
    """CPU tensors take the kernels, which are compiled and launched as on the target.

    Raises: RuntimeError at the end if the target would have refused a launch or a tensor map.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from lora_kernels.dispatch import algorithm
    from lora_kernels.kernels import config

    device, library = DEVICES[target], _load()
    library.standin_become(*device)
    library.standin_forget()

    from triton.backends.nvidia import driver as nvidia

    stand_in = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
    stand_in.utils, stand_in.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    stand_in.get_current_device = lambda: 0
    stand_in.set_current_device = lambda device: None
    stand_in.get_current_stream = lambda device: 0
    stand_in.get_device_capability = lambda index=0: divmod(device.capability, 10)
    stand_in.get_active_torch_device = lambda: torch.device("cpu")
    stand_in.get_current_target = lambda: GPUTarget("cuda", device.capability, 32)
    driver.set_active(stand_in)
    cpu = config.Stand(target if target in _TABLED else "other", device.num_sms)
    with (
        mock.patch.object(algorithm, "interpreted", return_value=True),
        mock.patch.object(config, "CPU", cpu),
    ):
        config.num_sms.cache_clear()
        yield
    config.num_sms.cache_clear()
    if faults := library.standin_faults().decode():
        raise RuntimeError(f"a GPU of {target} would have refused:\n{faults}")


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches within the context, in order, once it is left."""
    library, found = _load(), []
    library.standin_forget()
    library.standin_write(1)
    try:
        yield found
    finally:
        library.standin_write(0)
        for line in library.standin_written().decode().splitlines():
            kernel, grid, threads, shared, stream, *arguments = line.split()
            numbers = tuple(map(int, grid.split(",")))
            found.append(
                Launch(kernel, numbers, int(threads), int(shared), int(stream), tuple(arguments))
            )
