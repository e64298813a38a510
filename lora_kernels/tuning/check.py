"""Every kernel, dtype and algorithm, checked on this GPU against float64 in processes of their own.

Each variant runs twice and must have the same bits. Its tiles are those of a training run: measured
ones if there are any. Verdicts go into the user's cache directory, so that a training run need not
find them again.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from lora_kernels.dispatch.algorithm import SMALL_M, SMALLEST_M
from lora_kernels.kernels import linear, measured_tiles, selfcheck
from lora_kernels.kernels.registry import LAUNCHERS, kernel_of
from lora_kernels.kernels.selfcheck import Variant, WrongKernelError, of_launcher
from lora_kernels.spec import Needs
from lora_kernels.tuning import workers

__all__ = [
    "ALGORITHMS", "Checked", "as_text", "check", "names", "not_reached", "variants", "verify",
    "wrong",
]  # fmt: skip

ALGORITHMS = ("fused", "addmm")  # of lora_linear, checked as a whole
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
# Of a layer and of its factors.
_DTYPES = ((_BF16, _BF16), (_F16, _F16), (_F32, _F32), (_BF16, _F32), (_F16, _F32))
_HIGH_RANK = 64
_MOST_ROWS: dict[str, Any] = {"small_m": SMALL_M, "dropout": False}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A variant and why it cannot be trusted; None if it is right."""

    variant: Variant
    reason: str | None


def names() -> list[str]:
    """All that can be checked."""
    return [*LAUNCHERS, *ALGORITHMS]


def variants(only: Sequence[str] = ()) -> list[Variant]:
    """What is checked of these launchers and algorithms, of all if none is named.

    The most common come first: every dtype, float32 factors under autocast, then a layer in
    bfloat16 that differs in one thing.
    """
    chosen = list(only) or names()
    found = [_plain(name, *dtypes) for dtypes in _DTYPES for name in chosen]
    found += [_plain(n, _BF16, _F32)._replace(narrow=True) for n in chosen if _differs(n, "narrow")]
    found += [v._replace(**_MOST_ROWS) for v in found if v.small_m]
    plain = [_plain(name, _BF16, _BF16) for name in chosen]
    for change in (
        {"dropout": False},
        {"small_m": SMALLEST_M},
        _MOST_ROWS,
        {"aligned": False},
        {"r": _HIGH_RANK},
        {"transposed": True},
        {"enabled": (True, False, True)},
    ):
        of = (v for v in plain if all(_differs(v.launcher, field) for field in change))
        found += [v._replace(**change) for v in of]
    return list(dict.fromkeys(found))


def _plain(name: str, dtype: torch.dtype, lora_dtype: torch.dtype) -> Variant:
    """A variant in these dtypes; with few rows if its kernel takes no others."""
    few = name in LAUNCHERS and kernel_of(name).name == "gemm_small_m"
    return Variant(name, dtype, lora_dtype, small_m=SMALLEST_M if few else 0)


def _differs(name: str, field: str) -> bool:
    """Whether a field of a variant makes a difference to what a launcher compiles."""
    if name in ALGORITHMS:
        return True
    needed = LAUNCHERS[name].depends_on.split()
    return {
        "dropout": "p" in needed,
        "small_m": "m" in needed,
        "aligned": True,
        "r": "r" in needed,
        "transposed": {"n", "k"} <= set(needed),
        "enabled": "n" in needed,
        "narrow": "r" in needed,
    }[field]


def verify(task: tuple[Variant, str]) -> None:
    """Checks a variant on a device, "cuda" or "cpu". Raises: WrongKernelError; any of a launch."""
    variant, device = task[0], torch.device(task[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a bad file, which check() has said
        measured_tiles.use(device)
    if variant.launcher in ALGORITHMS:
        reason = _fault_of_algorithm(variant, device)
    else:
        reason = selfcheck.fault(variant, device, guard=True)
    if reason is not None:
        raise WrongKernelError(reason)


def _fault_of_algorithm(variant: Variant, device: torch.device) -> str | None:
    """selfcheck.fault of lora_linear and its backward, by the kernels of an algorithm."""
    o = of_launcher(variant, device)

    def run() -> list[torch.Tensor]:
        problem, algorithm = o.problem, variant.launcher
        operands = (problem.x, problem.w, problem.a, problem.b)
        y, h = linear.lora_linear_forward(
            algorithm, *operands, problem.bias, problem.seed, problem.spec
        )
        x, w, a, b = operands
        grads = linear.lora_linear_backward(
            algorithm, problem.dy, x, h, w, a, b, problem.seed, problem.spec,
            Needs(x=True, a=True, b=True),
        )  # fmt: skip
        return [y, *grads]

    with torch.no_grad():
        outputs, again = run(), run()
    exact, baseline = (
        [solved[name] for name in ("y", "x", "a", "b")]
        for solved in (o.problem.solve(torch.float64), o.problem.solve())
    )
    wrong = selfcheck.wrong_result(outputs, exact, baseline)
    if wrong is None and not all(map(torch.equal, outputs, again)):
        return "two runs differ"
    return wrong


def check(
    device: str, only: Sequence[str] = (), jobs: int | None = None, seconds: float = math.inf
) -> list[Checked]:
    """Checks the variants that the launchers take; those not begun within seconds say so.

    device: "cuda", or "cpu" for the interpreter. jobs: processes; 1 is this one.
    """
    jobs = workers.most_jobs() if jobs is None else jobs
    on, found = torch.device(device), []
    measured_tiles.use(on)
    for variant in variants(only):
        key = None if variant.launcher in ALGORITHMS else selfcheck.key_of(variant, on)
        if key is not None or variant.launcher in ALGORITHMS:
            found.append((variant, key))
    reasons = workers.attempt(verify, [(v, device) for v, _ in found], jobs, seconds=seconds)
    verdicts = {
        key: reason
        for (_, key), reason in zip(found, reasons, strict=True)
        if key and (reason is None or reason.startswith(WrongKernelError.__name__))
    }
    selfcheck.keep(verdicts, on, again={variant.launcher for variant, _ in found})
    return [Checked(v, reason) for (v, _), reason in zip(found, reasons, strict=True)]


def as_text(checked: Sequence[Checked]) -> str:
    """A row for each kernel: how many of its variants are right, of those that were reached, by
    dtype, - if none was; then what is wrong; then how many are wrong, or were not reached, if any.
    """
    counts: dict[str, dict[str, list[int]]] = {}
    for each in checked:
        right = counts.setdefault(each.variant.launcher, {}).setdefault(each.variant.dtypes, [0, 0])
        right[0] += each.reason is None
        right[1] += each.reason != workers.NOT_REACHED
    columns = list(dict.fromkeys(each.variant.dtypes for each in checked))
    title = "right of reached" if not_reached(checked) else "right of"
    wide = max(map(len, (*counts, title)))
    widths = [max(len(name), 7) for name in columns]
    head = "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    lines = [f"{title:{wide}}  {head}"]
    for name, row in counts.items():
        counted = (_cell(*row[c]) if c in row else "" for c in columns)
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(counted, widths, strict=True))
        lines.append(f"{name:{wide}}  {cells}".rstrip())
    failed, left = wrong(checked), not_reached(checked)
    lines += [f"{each.variant}: {each.reason}" for each in failed]
    if failed or left:
        last = f"of {len(checked)}, {len(failed)} are wrong, {len(left)} were {workers.NOT_REACHED}"
        lines.append(f"{last}: give more --seconds" if left else last)
    return "\n".join(lines)


def _cell(right: int, reached: int) -> str:
    return f"{right} of {reached}" if reached else "-"


def wrong(checked: Sequence[Checked]) -> list[Checked]:
    """Those that failed; not those that were not reached."""
    return [each for each in checked if each.reason not in (None, workers.NOT_REACHED)]


def not_reached(checked: Sequence[Checked]) -> list[Checked]:
    """Those for which there was no time."""
    return [each for each in checked if each.reason == workers.NOT_REACHED]
