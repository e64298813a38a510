"""The environment variables that doctor lists, and the values of them that nothing takes."""

import difflib
import os
import tempfile

from lora_kernels import environment
from lora_kernels.cli.advice import Missing
from lora_kernels.dispatch import cache, first_use
from lora_kernels.reference import products

__all__ = ["OF_TESTS", "VARIABLES", "misspelt", "not_taken", "unwritable_cache"]

# Those of docs/reference/environment.md but for the tests' own, and what hides GPUs.
VARIABLES = (
    "LORA_KERNELS_PLAN", "LORA_KERNELS_CPU_PRODUCTS", "LORA_KERNELS_CHECK", "LORA_KERNELS_TUNE",
    "LORA_KERNELS_CACHE", "LORA_KERNELS_QUIET", "LORA_KERNELS_REPORT",
    "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
OF_TESTS = (
    "LORA_KERNELS_TEST_SEED", "LORA_KERNELS_FORMATS", "LORA_KERNELS_DATA", "LORA_KERNELS_PATCH",
    "LORA_KERNELS_OUTCOMES",
)  # fmt: skip
_PREFIX = "LORA_KERNEL"  # without the S, too
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


def misspelt() -> list[Missing]:
    """The variables that look like this package's and that nothing reads."""
    own = [name for name in VARIABLES if name.startswith(_PREFIX)]
    found = []
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and name not in (*own, *OF_TESTS):
            (nearest,) = difflib.get_close_matches(name.upper(), own, n=1, cutoff=0.0)
            found.append(Missing(f"nothing reads {name}", f"the nearest name is {nearest}"))
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
