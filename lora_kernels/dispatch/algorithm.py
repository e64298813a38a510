"""Which algorithm a product takes, and why: the Triton kernels, or PyTorch's own operators.

``fused`` and ``addmm`` run the kernels, see kernels/; ``reference`` runs reference/. The
environment variable LORA_KERNELS_PLAN = auto | fused | addmm | reference is read in every call.
"""

import functools
import importlib.util
import os
import re
import warnings
from typing import NamedTuple

import torch

from lora_kernels.dispatch import measured
from lora_kernels.dispatch.table import TABLE, GemmShape

__all__ = [
    "ALGORITHMS", "SMALLEST_M", "SMALL_M", "Algorithm", "GemmShape", "asked", "capability_of",
    "choose", "interpreted", "is_free", "is_open", "is_small_m", "machine_obstacle",
    "rows_of_small_m", "tf32_allowed", "triton_version", "unmeasured", "warn_of_machine",
    "with_same_kernels",
]  # fmt: skip

ALGORITHMS = ("fused", "addmm", "reference")
FLOOR = (8, 0)  # the lowest capability for which Triton makes matrix instructions
BLACKWELL = (3, 7, 1)  # the first Triton with the fences between copies and tcgen05 products
SMALL_M = 64  # up to so many rows a layer is bound by reading its weight
SMALLEST_M = 16  # rows of the smallest tiles
_VARIABLE = "LORA_KERNELS_PLAN"
_INTERPRETED, _UNMEASURED = "TRITON_INTERPRET=1", "no measurement"  # reasons of choose()
# What os.environ keeps the variables in. Its own get() raises and catches, which takes as long as
# an allocation on a GPU does.
_environ = getattr(os.environ, "_data", None) if os.name == "posix" else None
_ENCODED = {name: os.fsencode(name) for name in (_VARIABLE, "TRITON_INTERPRET")}
_PLAN_CODE, _INTERPRET_CODE = _ENCODED.values()
_FORMER = {"sandwich": "addmm"}  # values of the variable that have another name now


class Algorithm(NamedTuple):
    """The algorithm of a product, and the reason in words."""

    name: str
    reason: str


def is_small_m(m: int, dropout: bool) -> bool:
    """Whether one kernel makes h and y of m rows: fewer if every program has to draw the mask."""
    return m <= _most(dropout)


def _most(dropout: bool) -> int:
    return SMALLEST_M if dropout else SMALL_M


def with_same_kernels(m: int, bounds: tuple[int, int], dropout: bool) -> tuple[int, int]:
    """Of bounds around a forward's m, the part in which fused launches the same kernels."""
    low, high = bounds
    if is_small_m(m, dropout):
        return low, min(high, _most(dropout))
    return max(low, _most(dropout) + 1), high


def rows_of_small_m(m: int, dropout: bool) -> int:
    """The rows of the tiles that make h and y of so few rows in one kernel; 0 if several do."""
    if not is_small_m(m, dropout):
        return 0
    return SMALLEST_M if m <= SMALLEST_M else SMALL_M


def unmeasured(shape: GemmShape) -> str:
    """The algorithm for a product that no entry of the table covers.

    It is addmm: cuBLAS computes its large part, so it is never far from the best. The exception is
    the forward of a small m up to rank 32. There addmm takes three launches besides cuBLAS's, and
    fused takes one in all. Without matrix instructions, which float32 has under TF32 alone, that
    one takes longer than cuBLAS.
    """
    narrow = shape.dtype.itemsize == 2 and shape.uniform
    one_launch = is_small_m(shape.m, shape.dropout) and shape.r <= 32 and not shape.backward
    one_launch = one_launch and (narrow or tf32_allowed())
    return "fused" if one_launch else "addmm"


def choose(shape: GemmShape) -> Algorithm:
    """The algorithm that lora_linear or its backward takes for a product, and the reason.

    Raises: ValueError if LORA_KERNELS_PLAN has an unknown value.
    """
    plan = _plan(asked())
    device = shape.device
    if plan == "reference":
        return Algorithm("reference", f"{_VARIABLE}=reference")
    if min(shape.m, shape.n, shape.k, shape.r) == 0:
        return Algorithm("reference", "the product is empty")
    if shape.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Algorithm("reference", f"the kernels do not take {shape.dtype}")
    if device.type not in ("cpu", "cuda"):
        return Algorithm("reference", f"there are no kernels for {device.type}")
    if device.type == "cpu" and not interpreted():
        return Algorithm("reference", "on a CPU PyTorch's operators run")
    if (obstacle := machine_obstacle(device)) is not None:
        return Algorithm("reference", obstacle)
    if plan != "auto":
        return Algorithm(plan, f"{_VARIABLE}={plan}")
    capability = capability_of(device)
    for entry in measured.entries(device, capability):
        if entry.holds(shape, capability):
            return Algorithm(entry.algorithm, f"measured on {entry.source}")
    if device.type == "cpu":
        _warn_of_interpreter()
        return Algorithm("fused", _INTERPRETED)
    for entry in TABLE:
        if entry.holds(shape, capability):
            return Algorithm(entry.algorithm, f"measured: {entry.source}")
    return Algorithm(unmeasured(shape), f"{_UNMEASURED} for capability {capability} holds here")


def is_open(algorithm: Algorithm) -> bool:
    """Whether neither the user nor a measurement has decided between fused and addmm."""
    return algorithm.reason == _INTERPRETED or algorithm.reason.startswith(_UNMEASURED)


def asked() -> str:
    """The value of LORA_KERNELS_PLAN as it is now, which choose checks."""
    value = _read(_VARIABLE)
    return "auto" if value is None else value


def is_free() -> bool:
    """Whether neither LORA_KERNELS_PLAN nor TRITON_INTERPRET asks for an algorithm now."""
    if _environ is not None and _PLAN_CODE not in _environ and _INTERPRET_CODE not in _environ:
        return True
    return asked() == "auto" and not interpreted()


def _read(variable: str) -> str | None:
    """A variable of the environment as it is now."""
    if _environ is None:
        return os.environ.get(variable)
    value = _environ.get(_ENCODED[variable])
    return None if value is None else os.fsdecode(value)


def _plan(asked: str) -> str:
    """asked by the name that it has now. Raises: ValueError."""
    if asked in _FORMER:
        warnings.warn(
            f"{_VARIABLE}={asked} is called {_VARIABLE}={_FORMER[asked]} now",
            FutureWarning,
            stacklevel=3,
        )
        asked = _FORMER[asked]
    if asked not in ("auto", *ALGORITHMS):
        raise ValueError(f"{_VARIABLE} must be one of auto, {', '.join(ALGORITHMS)}, got {asked!r}")
    return asked


@functools.cache
def machine_obstacle(device: torch.device) -> str | None:
    """Why no product takes the kernels on this device, in words; None if they run there."""
    if not _has_triton():
        return "triton 3.4 or newer is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = capability_of(device)
    if capability < FLOOR:
        return (
            f"Triton multiplies without matrix instructions on capability {capability}, below 8.0"
        )
    if capability >= (10, 0) and triton_version() < BLACKWELL:
        return (
            f"Triton before 3.7.1 leaves out fences in the kernels on capability {capability}, so "
            f"results could be wrong: install triton 3.7.1 or newer"
        )
    return None


def warn_of_machine(device: torch.device) -> None:
    """Says once if a GPU does not run the kernels. What PyTorch computes instead is slower."""
    obstacle = machine_obstacle(device) if device.type == "cuda" else None
    if obstacle is not None and asked() != "reference" and obstacle not in _said:
        _said.add(obstacle)
        warnings.warn(
            f"lora_kernels: plain PyTorch computes on {device}: {obstacle}",
            RuntimeWarning,
            stacklevel=3,
        )


def _warn_of_interpreter() -> None:
    """Says once that kernels are interpreted, outside of tests."""
    if _INTERPRETED not in _said and "PYTEST_CURRENT_TEST" not in os.environ:
        _said.add(_INTERPRETED)
        warnings.warn(
            "lora_kernels: TRITON_INTERPRET is set: kernels run in Triton's interpreter, which is "
            "for tests and takes hundreds of times as long as PyTorch's operators, which run "
            "without it",
            RuntimeWarning,
            stacklevel=4,
        )


_said: set[str] = set()


def tf32_allowed() -> bool:
    """Whether torch's own float32 products may use TF32 now."""
    if _fp32_precision is not None:
        return _fp32_precision("cuda", "matmul") == "tf32"
    return torch.backends.cuda.matmul.allow_tf32


# What torch.backends.cuda.matmul.fp32_precision reads, for a tenth of the time. The older of the
# two settings cannot be read if the newer one was used.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The capability of a GPU; (0, 0) of the CPU that interprets."""
    return (0, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


@functools.cache
def _has_triton() -> bool:
    """Whether a triton is installed in which launchers can make tensor descriptors."""
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ModuleNotFoundError:
        return False


def triton_version() -> tuple[int, ...]:
    """The numbers of the installed Triton, such as (3, 6, 0)."""
    import triton

    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, which is for tests alone."""
    value = _read("TRITON_INTERPRET")
    return value is not None and value.lower() in ("1", "true", "yes", "on", "y")
