"""Compiles kernels for GPUs that are not there, by their own launchers, and reads machine code.

A driver that loads and runs nothing stands in for the part's. What a launcher would launch, with
its very arguments, specialisation and configuration, is compiled to the end; meta tensors stand in
for operands. One process compiles for one target, and not under TRITON_INTERPRET.
"""

import contextlib
import re
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import standin
from lora_kernels.kernels.hazards import cuobjdump, hazards

# Largest shared memory of one program, in bytes, and multiprocessors.
SHARED = {target: device.shared for target, device in standin.DEVICES.items()}
PROCESSORS = {target: device.num_sms for target, device in standin.DEVICES.items()}
SHARED |= dict.fromkeys(("gfx90a", "gfx942", "gfx1100"), 65536)
PROCESSORS |= {"gfx90a": 110, "gfx942": 304, "gfx1100": 96}
TARGETS = tuple(SHARED)
TESTED = ("sm_80", "sm_90", "sm_100", "gfx942")  # by the ordinary tests, for want of time
_HIP_CAPABILITY = {"gfx90a": (9, 0), "gfx942": (9, 4), "gfx1100": (11, 0)}


class _Driver:
    """As much of a Triton driver as compiling and a launch without effect need."""

    def __init__(self, target: str):
        self._target = (
            GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)
            if target.startswith("gfx")
            else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        )
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED[target]},
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def launcher_cls(self, src, metadata):
        return lambda *args: None


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Launches compile for the target and do nothing more; "sm_90", "gfx942", …"""
    hip = target.startswith("gfx")
    capability = _HIP_CAPABILITY[target] if hip else divmod(int(target.removeprefix("sm_")), 10)
    properties = types.SimpleNamespace(multi_processor_count=PROCESSORS[target])
    driver.set_active(_Driver(target))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.version.hip", "6.0" if hip else None),
    ):
        yield


@dataclass(frozen=True)
class Report:
    """What the machine code of one compiled kernel says."""

    registers: int
    shared: int
    spills: int
    matrix_instructions: int
    needs_matrix: bool
    hazards: int = 0

    def faults(self, target: str) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED[target]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.needs_matrix and not self.matrix_instructions:
            found.append("no matrix instruction")
        if self.hazards:
            found.append(f"{self.hazards} registers overwritten while a WGMMA reads them")
        return found


def reports(kernel: triton.JITFunction, seen: set) -> Iterator[Report]:
    """A report on each compilation of a kernel that seen does not hold yet."""
    for key, compiled in kernel.device_caches[0][0].items():
        if key not in seen:
            seen.add(key)
            yield _inspect(compiled)


def _inspect(compiled) -> Report:
    # Triton's own code says which dots there are; float32 ones without TF32 need no matrix unit.
    dots = re.findall(r"tt\.dot .*", compiled.asm["ttir"])
    needs_matrix = any(re.search(r"tensor<\w+x(bf16|f16)>", dot) or "tf32" in dot for dot in dots)
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    registers, spills, matrix, hazards = read(compiled)
    return Report(registers, compiled.metadata.shared, spills, matrix, needs_matrix, hazards)


def _read_cubin(compiled) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))  # stores to and loads from local memory
    matrix = len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", code))
    return registers, spills, matrix, len(hazards(code))


def _read_amdgcn(compiled) -> tuple[int, int, int, int]:
    code = compiled.asm["amdgcn"]
    # Scalar registers that run out move to lanes of vector registers; memory is what counts.
    registers, spilled, scratch = (
        int(re.search(rf"\.{field}:\s+(\d+)", code)[1])
        for field in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, max(spilled, scratch), len(re.findall(r"\bv_(?:mfma|wmma)", code)), 0
