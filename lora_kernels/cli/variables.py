"""The environment variables that doctor lists, and the values of them that nothing takes."""

import os
import tempfile

from lora_kernels import environment
from lora_kernels.cli.advice import Missing
from lora_kernels.dispatch import cache, first_use
from lora_kernels.reference import products

__all__ = ["VARIABLES", "not_taken", "unwritable_cache"]

# Those of docs/reference/environment.md but for the tests' own, and what hides GPUs.
VARIABLES = (
    "LORA_KERNELS_PLAN", "LORA_KERNELS_CPU_PRODUCTS", "LORA_KERNELS_CHECK", "LORA_KERNELS_TUNE",
    "LORA_KERNELS_CACHE", "LORA_KERNELS_QUIET", "LORA_KERNELS_REPORT",
    "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
# choose() checks LORA_KERNELS_PLAN. The others take whatever they are set to.
_TAKEN = {
    "LORA_KERNELS_CPU_PRODUCTS": products.VALUES,
    "LORA_KERNELS_TUNE": first_use.VALUES,
    **dict.fromkeys(environment.SWITCHES, environment.VALUES),
}


def not_taken() -> list[Missing]:
    """The variables with values that they do not take: calls raise, or warn."""
    found = []
    for name, values in _TAKEN.items():
        asked = os.environ.get(name, values[0])
        if asked not in values:
            listed = ", ".join(value for value in values if value)
            found.append(Missing(f"{name} must be one of {listed}, got {asked!r}", f"unset {name}"))
    return found


def unwritable_cache() -> list[Missing]:
    """The cache directory, if no file can be written there; nothing is left behind by trying."""
    path = there = cache.directory()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [
            Missing(
                f"the cache directory {path} cannot be written, so what is checked and "
                f"measured on a GPU is lost: {error.strerror}",
                "set LORA_KERNELS_CACHE to a directory that can be written",
            )
        ]
