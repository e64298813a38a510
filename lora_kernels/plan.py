"""Which plan a product takes, and why: the Triton kernels, or PyTorch's own operators.

``fused`` and ``sandwich`` run the kernels, see kernels/; ``reference`` runs reference.py. The
environment variable LORA_KERNELS_PLAN = auto | fused | sandwich | reference is read in every call.
"""

import functools
import importlib.util
import math
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = [
    "FEW_ROWS", "PLANS", "TABLE", "Measured", "Plan", "Product", "aligned", "capability_of",
    "choose", "failures", "one_launch_rows", "run", "unmeasured",
]  # fmt: skip

PLANS = ("fused", "sandwich", "reference")
_VARIABLE = "LORA_KERNELS_PLAN"
_Result = TypeVar("_Result")


class Product(NamedTuple):
    """What a plan is chosen by: x [m, k], w [n, k], rank r, and how they lie in memory.

    aligned: whether the large operands can be read through tensor descriptors, see aligned().
    backward: whether the large product is dy·w, with the mask behind it, and not x·wᵀ.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    device: torch.device
    dropout: bool = False
    aligned: bool = True
    backward: bool = False


class Plan(NamedTuple):
    """The plan of a product, and the reason in words."""

    name: str
    reason: str


@dataclass(frozen=True)
class Measured:
    """A row of the table: this plan was the fastest on this part for products within the bounds."""

    capability: tuple[int, int]
    dtype: torch.dtype
    plan: str
    source: str  # the result file
    m: tuple[float, float] = (1, math.inf)
    n: tuple[float, float] = (1, math.inf)
    k: tuple[float, float] = (1, math.inf)
    r: tuple[float, float] = (1, math.inf)
    dropout: bool | None = None  # None, here and below: either
    aligned: bool | None = True
    backward: bool | None = None

    def holds(self, product: Product, capability: tuple[int, int]) -> bool:
        # In every call, of every row: what most rows differ in comes first.
        return (
            self.n[0] <= product.n <= self.n[1]
            and self.k[0] <= product.k <= self.k[1]
            and self.m[0] <= product.m <= self.m[1]
            and self.r[0] <= product.r <= self.r[1]
            and self.backward in (None, product.backward)
            and self.dropout in (None, product.dropout)
            and self.aligned in (None, product.aligned)
            and self.dtype == product.dtype
            and self.capability == capability
        )


# Filled by measurement; the first row that holds decides.
TABLE: tuple[Measured, ...] = ()

FEW_ROWS = 64  # up to here a layer is bound by reading its weight


def one_launch_rows(dropout: bool) -> int:
    """Up to how many rows one kernel makes h and y: with dropout every program draws the mask."""
    return 16 if dropout else FEW_ROWS


def unmeasured(product: Product) -> str:
    """The plan of a product that no row of the table holds for.

    It is the sandwich, which with cuBLAS for its large part is never far from the best, but for few
    rows, where it is three launches beside the one of cuBLAS.
    """
    few = product.m <= one_launch_rows(product.dropout)
    one_launch = few and product.r <= 32 and not product.backward
    return "fused" if one_launch else "sandwich"


def choose(product: Product) -> Plan:
    """The plan that lora_linear or its backward takes for a product, and the reason.

    Raises: ValueError where LORA_KERNELS_PLAN holds none of its values.
    """
    asked = os.environ.get(_VARIABLE, "auto")
    if asked not in ("auto", *PLANS):
        raise ValueError(f"{_VARIABLE} must be one of auto, {', '.join(PLANS)}, got {asked!r}")
    device = product.device
    if asked == "reference":
        return Plan("reference", f"{_VARIABLE}=reference")
    if min(product.m, product.n, product.k, product.r) == 0:
        return Plan("reference", "the product is empty")
    if product.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Plan("reference", f"the kernels take no {product.dtype}")
    if device.type not in ("cpu", "cuda"):
        return Plan("reference", f"there are no kernels for {device.type}")
    if device.type == "cpu" and not _interpreted():
        return Plan("reference", "CPU tensors reach the kernels only under TRITON_INTERPRET=1")
    if not _has_triton():
        return Plan("reference", "triton 3.4 or newer is not installed")
    if asked != "auto":
        return Plan(asked, f"{_VARIABLE}={asked}")
    if device.type == "cpu":
        return Plan("fused", "TRITON_INTERPRET=1")
    capability = capability_of(device)
    for row in TABLE:
        if row.holds(product, capability):
            return Plan(row.plan, f"measured: {row.source}")
    return Plan(unmeasured(product), f"no measurement for capability {capability} holds here")


def aligned(*matrices: Tensor | None) -> bool:
    """Whether tensor descriptors can hold these: 16-byte rows, one unit stride each."""
    return all(
        t is None
        or (
            t.data_ptr() % 16 == 0
            and 1 in t.stride()
            and all(s == 1 or s * t.element_size() % 16 == 0 for s in t.stride())
        )
        for t in matrices
    )


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _has_triton() -> bool:
    """Whether there is a triton with tensor descriptors that launchers make."""
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ModuleNotFoundError:
        return False


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


_failed: dict[tuple[str, tuple], str] = {}
# The device's own errors, which come from wherever it is asked next, and memory that ran out.
_NOT_OURS = re.compile(
    "out of memory|ALLOC_FAILED|CUDA error|illegal|misaligned|unspecified launch failure"
    "|device-side assert|captur",
    re.IGNORECASE,
)


def run(plan: Plan, what: Callable[[], tuple], by_plan: Callable[[str], _Result]) -> _Result:
    """by_plan(plan.name); where its kernels do not compile or launch, the next plan's result.

    what: gives the op, device and dtypes. A plan that failed for them is not tried again, and that
    is said once. Running out of memory and the device's own errors are raised.
    """
    for name in PLANS[PLANS.index(plan.name) : -1]:
        if _failed and (name, what()) in _failed:
            continue
        try:
            return by_plan(name)
        except Exception as error:
            if not _is_a_kernels(error):
                raise
            _give_up(name, what(), error)
    return by_plan("reference")


def failures() -> dict[tuple[str, tuple], str]:
    """The reason by (plan, what) of all that did not compile or launch in this process.

    what: as what() of run().
    """
    return dict(_failed)


def _give_up(name: str, what: tuple, error: Exception) -> None:
    reason = _failed[name, what] = f"{type(error).__name__}: {error}"
    following = PLANS[PLANS.index(name) + 1]
    warnings.warn(
        f"lora_kernels: plan {name} failed for {' '.join(map(str, what))} and {following} takes "
        f"its place: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_a_kernels(error: Exception) -> bool:
    """Whether compiling or launching a kernel failed, and not the device or this package."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return isinstance(error, ImportError)
    if isinstance(error, TritonError):
        return True
    faults = (ImportError, OSError, RuntimeError, subprocess.SubprocessError)
    outside = isinstance(error, torch.OutOfMemoryError) or _NOT_OURS.search(str(error))
    return isinstance(error, faults) and not outside
