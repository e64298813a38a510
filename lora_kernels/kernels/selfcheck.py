"""Whether the kernels are right on this GPU: launchers against their formulas in float64, twice.

Compilers have faults that only some GPUs show. A variant is what one compilation of a kernel
serves. Random operands of two tiles in each direction are enough to meet edges, loops and masks.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.checks import dtype_name
from lora_kernels.dispatch import cache
from lora_kernels.dispatch.algorithm import tf32_allowed
from lora_kernels.dispatch.fallback import KernelError, of_kernels
from lora_kernels.kernels import hazards
from lora_kernels.kernels.launch import watched
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import LAUNCHERS, entry_for
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close

__all__ = [
    "Variant", "WrongKernelError", "fault", "first_use", "keep", "key_of", "of_launcher",
    "wrong_result",
]  # fmt: skip

_KIND = "checked"  # of the file in the cache
_VARIABLE = "LORA_KERNELS_CHECK"
# m, n, k: more than two tiles on a GPU, where tiles have up to 256 rows and columns.
_SIZES = {"cuda": (300, 520, 264), "cpu": (72, 80, 88)}
_verdicts: dict[torch.device, dict[str, str | None]] = {}
_one_thread = threading.RLock()  # or one would put back what another has changed


class WrongKernelError(KernelError):
    """A kernel whose results are wrong on this GPU, or differ from run to run."""


class Variant(NamedTuple):
    """What decides about the machine code that a launcher takes.

    dtype: of x, w and y; lora_dtype: of the factors. small_m: the rows, if one kernel makes h and y
    of them, else 0. aligned: whether tensor descriptors can describe the operands. transposed:
    whether w is stored [K, N]. narrow: whether factors in a wider dtype are rounded to that of the
    layer in products. enabled: which groups of y's columns have an update.
    """

    launcher: str
    dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype = torch.float32
    r: int = 16
    dropout: bool = True
    small_m: int = 0
    aligned: bool = True
    transposed: bool = False
    narrow: bool = False
    enabled: tuple[bool, ...] = (True,)

    def __str__(self) -> str:
        groups = "".join(str(int(enabled)) for enabled in self.enabled)
        flags = {
            "dropout": self.dropout,
            f"m <= {self.small_m}": self.small_m > 0,
            "unaligned": not self.aligned,
            "transposed": self.transposed,
            "narrow": self.narrow,
            f"groups {groups}": len(self.enabled) > 1,
        }
        parts = [self.launcher, self.dtypes, f"r={self.r}"]
        return " ".join(parts + [name for name, holds in flags.items() if holds])

    @property
    def dtypes(self) -> str:
        """Both dtypes in words; one if they are equal."""
        both = dict.fromkeys((self.dtype, self.lora_dtype))
        return "/".join(dtype_name(dtype) for dtype in both)


def of_launcher(variant: Variant, device: torch.device) -> Operands:
    """Random operands of a variant. The state of PyTorch's generators stays as it is."""
    m, n, k = _SIZES[device.type]
    m, n = variant.small_m or m, max(n, 8 * (len(variant.enabled) + 1))
    k = k if variant.aligned else k - 1
    with _own_state(device, 0), torch.device(device):
        problem = make_problem(
            m, k, n, variant.r, device=device, dtype=variant.dtype, lora_dtype=variant.lora_dtype,
            dropout_p=0.25 if variant.dropout else 0.0, groups=_groups(n, variant.enabled),
        )  # fmt: skip
        if variant.transposed:
            problem.w = problem.w.T.contiguous().T
        problem.spec = dataclasses.replace(problem.spec, narrow=variant.narrow)
        return Operands(problem)


@contextlib.contextmanager
def _own_state(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from a seed, in float32; generators and default dtype stay as they are."""
    gpus = [device] if device.type == "cuda" else []
    with _one_thread, torch.random.fork_rng(gpus):
        default = torch.get_default_dtype()
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:  # torch.manual_seed would seed all others, too
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _groups(n: int, enabled: Sequence[bool]) -> list[tuple[int, bool]]:
    """n columns in groups of which the first is the widest, as with grouped-query attention."""
    others = n // (len(enabled) + 1) // 8 * 8
    sizes = [n - others * (len(enabled) - 1), *[others] * (len(enabled) - 1)]
    return list(zip(sizes, enabled, strict=True))


def key_of(variant: Variant, device: torch.device) -> str | None:
    """The variant with the tiles that it takes, as the file has it; None if it is not taken."""
    o = of_launcher(variant, device)
    if not LAUNCHERS[variant.launcher].supports(o):
        return None
    tf32 = torch.float32 in (variant.dtype, variant.lora_dtype) and tf32_allowed()
    return f"{variant}{' tf32' * tf32} {entry_for(variant.launcher, o)[1]}"


def wrong_result(
    outputs: Sequence[Tensor], exact: Sequence[Tensor], baseline: Sequence[Tensor]
) -> str | None:
    """What is wrong with results by the one tolerance; None if nothing is.

    exact, baseline: the formula in float64 and in the dtype in which a result is judged, which for
    h and dh is that of the layer that they serve.
    """
    try:
        for output, right, own in zip(outputs, exact, baseline, strict=True):
            assert_close(output.to(own.dtype), right, own, "result")
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def fault(variant: Variant, device: torch.device, guard: bool = False) -> str | None:
    """Why a variant cannot be trusted; None if two runs are right and have the same bits.

    guard: whether to look for elements that are not written, or written outside of the outputs.
    All of the process must be at rest then.
    Raises: what compiling and launching raise.
    """
    launcher, o = LAUNCHERS[variant.launcher], of_launcher(variant, device)
    memory = guarded_outputs() if guard else contextlib.nullcontext()
    try:
        with _own_state(device, 1), torch.no_grad():  # some operands are drawn when they are needed
            with memory, watched() as compiled:
                outputs = launcher(o)
            again = launcher(o)
            exact, baseline = (launcher.formula(o, t) for t in (torch.float64, o.x.dtype))
    except AssertionError as error:
        return f"wrong: {error}"
    wrong = wrong_result(outputs, exact, baseline)
    if wrong is None and not all(map(torch.equal, outputs, again)):
        return "two runs differ"
    with of_kernels():  # it starts a program of Triton's, which may not be there
        return wrong or hazards.fault(compiled, device)


# ---- at the first use ----


def first_use(variants: Iterable[Variant], device: torch.device) -> None:
    """Checks those of the variants that were not checked on this device before, here or elsewhere.

    Verdicts are kept in the user's cache directory; if that cannot be written, in this process. On
    a CPU, in the interpreter, nothing is checked unless LORA_KERNELS_CHECK=1. LORA_KERNELS_CHECK=0
    turns it off. Nothing is checked while a CUDA graph is captured.
    Raises: WrongKernelError for the first that is wrong; what compiling and launching raise.
    """
    if not _is_asked(device):
        return
    known = _verdicts.get(device)
    if known is None:
        known = _verdicts[device] = dict(cache.read(_KIND, device))
    found = {}
    for variant in variants:
        key = key_of(variant, device)
        if key is None:
            continue
        if key not in known:
            found[key] = known[key] = fault(variant, device)
        if known[key] is not None:
            keep(found, device)
            raise WrongKernelError(
                f"{variant} is not right on this GPU ({known[key]}); please report it with the "
                f"output of lora-kernels check. {_VARIABLE}=0 uses it all the same"
            )
    keep(found, device)


def _is_asked(device: torch.device) -> bool:
    asked = os.environ.get(_VARIABLE)
    if device.type != "cuda":
        return asked == "1"
    return asked != "0" and not torch.cuda.is_current_stream_capturing()


def keep(found: dict[str, str | None], device: torch.device, again: Collection[str] = ()) -> None:
    """Adds verdicts, by key_of, to the file, if it can be written: it saves time and no more.

    again: launchers that were checked anew: what else is kept as wrong of them is dropped, so that
    its next use checks it.
    """
    known = cache.read(_KIND, device)
    kept = {
        key: reason
        for key, reason in known.items()
        if reason is None or key.partition(" ")[0] not in again
    }
    if found or len(kept) < len(known):
        with contextlib.suppress(OSError):
            cache.write(_KIND, device, {**kept, **found})
