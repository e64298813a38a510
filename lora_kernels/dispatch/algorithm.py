"""Which algorithm a product takes, and why: the Triton kernels, or PyTorch's own operators.

``fused`` and ``addmm`` run the kernels, see kernels/; ``reference`` runs reference/. The
environment variable LORA_KERNELS_PLAN = auto | fused | addmm | reference is read in every call.
"""

import functools
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch

from lora_kernels.dispatch import measured
from lora_kernels.dispatch.table import TABLE, GemmShape

__all__ = [
    "ALGORITHMS", "SMALL_M", "Algorithm", "GemmShape", "capability_of", "choose", "is_open",
    "is_small_m", "unmeasured",
]  # fmt: skip

ALGORITHMS = ("fused", "addmm", "reference")
SMALL_M = 64  # up to so many rows a layer is bound by reading its weight
_VARIABLE = "LORA_KERNELS_PLAN"
_INTERPRETED, _UNMEASURED = "TRITON_INTERPRET=1", "no measurement"  # reasons of choose()
_FORMER = {"sandwich": "addmm"}  # values of the variable that have another name now


class Algorithm(NamedTuple):
    """The algorithm of a product, and the reason in words."""

    name: str
    reason: str


def is_small_m(m: int, dropout: bool) -> bool:
    """Whether one kernel makes h and y of m rows: fewer if every program has to draw the mask."""
    return m <= (16 if dropout else SMALL_M)


def unmeasured(shape: GemmShape) -> str:
    """The algorithm for a product that no entry of the table covers.

    It is addmm: cuBLAS computes its large part, so it is never far from the best. The exception is
    the forward of a small m up to rank 32. There addmm takes three launches besides cuBLAS's, and
    fused takes one in all.
    """
    one_launch = is_small_m(shape.m, shape.dropout) and shape.r <= 32 and not shape.backward
    return "fused" if one_launch else "addmm"


def choose(shape: GemmShape) -> Algorithm:
    """The algorithm that lora_linear or its backward takes for a product, and the reason.

    Raises: ValueError if LORA_KERNELS_PLAN has an unknown value.
    """
    asked = _asked()
    device = shape.device
    if asked == "reference":
        return Algorithm("reference", f"{_VARIABLE}=reference")
    if min(shape.m, shape.n, shape.k, shape.r) == 0:
        return Algorithm("reference", "the product is empty")
    if shape.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Algorithm("reference", f"the kernels do not take {shape.dtype}")
    if device.type not in ("cpu", "cuda"):
        return Algorithm("reference", f"there are no kernels for {device.type}")
    if device.type == "cpu" and not _interpreted():
        return Algorithm("reference", "CPU tensors reach the kernels only under TRITON_INTERPRET=1")
    if not _has_triton():
        return Algorithm("reference", "triton 3.4 or newer is not installed")
    if asked != "auto":
        return Algorithm(asked, f"{_VARIABLE}={asked}")
    capability = capability_of(device)
    for entry in measured.entries(device, capability):
        if entry.holds(shape, capability):
            return Algorithm(entry.algorithm, f"measured on {entry.source}")
    if device.type == "cpu":
        return Algorithm("fused", _INTERPRETED)
    for entry in TABLE:
        if entry.holds(shape, capability):
            return Algorithm(entry.algorithm, f"measured: {entry.source}")
    return Algorithm(unmeasured(shape), f"{_UNMEASURED} for capability {capability} holds here")


def is_open(algorithm: Algorithm) -> bool:
    """Whether neither the user nor a measurement has decided between fused and addmm."""
    return algorithm.reason == _INTERPRETED or algorithm.reason.startswith(_UNMEASURED)


def _asked() -> str:
    asked = os.environ.get(_VARIABLE, "auto")
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


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
