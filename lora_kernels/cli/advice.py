"""What doctor says of a machine on which the kernels run, and of one on which they could."""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_kernels.dispatch import cache, measured
from lora_kernels.dispatch.algorithm import asked, interpreted

__all__ = ["Missing", "compiler", "notes", "warned"]

_COMPILERS = ("gcc", "clang")  # that Triton looks for
_PACKAGES = "apt-get install gcc python3-dev, or set CC"


@dataclass(frozen=True)
class Missing:
    """Something that keeps the kernels from running, or from being at their best; and its fix."""

    what: str
    fix: str


def compiler() -> list[Missing]:
    """What Triton lacks to build the launchers of kernels: a C compiler, the headers of Python."""
    found = []
    asked = os.environ.get("CC")
    if asked and shutil.which(asked) is None:
        found.append(Missing(f"CC={asked} is no compiler that Triton could start", "unset CC"))
    elif not asked and not any(map(shutil.which, _COMPILERS)):
        names = ", ".join(_COMPILERS)
        found.append(Missing(f"no C compiler for Triton: none of {names}", _PACKAGES))
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        found.append(Missing(f"{headers}, which Triton compiles with, is not there", _PACKAGES))
    return found


def notes(algorithms: Sequence[Mapping[str, str]], device: torch.device) -> list[Missing]:
    """What could be better for a device, or is in force there, and how to change it.

    algorithms: rows with product and reason, as doctor has them.
    """
    found = []
    if any(row["reason"].startswith("no measurement") for row in algorithms):
        found.append(
            Missing(
                f"algorithms and tiles were not measured on {device}", "lora-kernels tune MODEL"
            )
        )
    if torch.are_deterministic_algorithms_enabled():
        found.append(_deterministic())
    if device.type == "cpu" and not interpreted():  # no kernel runs, and no file is read
        return [*found, *_no_choice(asked())]
    return [*found, *_cached(device)]


def warned(caught: Sequence[warnings.WarningMessage], device: torch.device) -> list[Missing]:
    """Warnings of this package about a device's files and variables, with what changes it.

    Those of others are given again.
    """
    found = []
    for warning in caught:
        what = " ".join(str(warning.message).split())
        fix = next((fix for word, fix in _fixes(device).items() if word in what), None)
        if fix is None:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        else:
            found.append(Missing(what.removeprefix("lora_kernels: "), fix))
    return found


def _fixes(device: torch.device) -> dict[str, str]:
    """What changes what a warning with these words is about."""
    return {
        f"{cache.path_of(measured.KIND, device)} is ignored": "lora-kernels tune --clear removes "
        "it, lora-kernels tune MODEL measures again",
        f"{cache.path_of('checked', device)} is ignored": "lora-kernels check makes it anew",
        "TRITON_INTERPRET is set": "unset TRITON_INTERPRET",
        "LORA_KERNELS_PLAN=": "set it to the new name",
    }


def _deterministic() -> Missing:
    fix = "the kernels are deterministic: torch.use_deterministic_algorithms(False) saves time"
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        fix = "set CUBLAS_WORKSPACE_CONFIG=:4096:8, without which cuBLAS refuses to multiply"
    return Missing("PyTorch's deterministic mode is on, which fills every new tensor", fix)


def _no_choice(plan: str) -> list[Missing]:
    """What LORA_KERNELS_PLAN does on a CPU if it asks for kernels."""
    if plan in ("auto", "reference"):
        return []
    what = f"LORA_KERNELS_PLAN={plan} chooses on a GPU; on a CPU PyTorch's operators run"
    return [Missing(what, "unset LORA_KERNELS_PLAN")]


def _cached(device: torch.device) -> list[Missing]:
    """Files of the cache directory that hold for the device."""
    found = []
    content = measured.content(device)
    counts = {name: len(content[name]) for name in ("algorithms", "tiles")}
    if any(counts.values()):
        found.append(
            Missing(
                f"{cache.path_of(measured.KIND, device)} is in use: "
                f"{counts['algorithms']} algorithms, {counts['tiles']} tiles",
                "lora-kernels tune --clear removes it",
            )
        )
    verdicts = cache.read("checked", device)
    wrong = [name for name, reason in verdicts.items() if reason is not None]
    if verdicts:
        path = cache.path_of("checked", device)
        what = f"{path} is in use: {len(verdicts)} kernels are checked, {len(wrong)} are wrong"
        fix = "lora-kernels check checks all of them again"
        found.append(Missing("; ".join((what, *wrong)), fix))
    if os.environ.get("LORA_KERNELS_CHECK") == "0":
        found.append(
            Missing("kernels are not checked at their first use", "unset LORA_KERNELS_CHECK")
        )
    return found
