"""Frozen weights that are not dense: a file for each library that makes them.

A file makes of the library's layer a FrozenWeight; layers and ops see nothing else of it. No
library is imported here: if its module is not loaded, no layer is of it.
"""

from lora_kernels.quantization.base import FourBit, FrozenWeight, NotFrozen
from lora_kernels.quantization.find import find, frozen_weight, is_quantised, restore

__all__ = [
    "FourBit", "FrozenWeight", "NotFrozen", "find", "frozen_weight", "is_quantised", "restore",
]  # fmt: skip
