"""The dropout mask of x: a pure function of (seed, row, column), the same on every device."""

from lora_kernels.dropout.cpu import keep_mask, masks
from lora_kernels.dropout.mask import LANES, MULTIPLIERS, ROUNDS, WEYL, keep, keep_scale, threshold

__all__ = [
    "LANES", "MULTIPLIERS", "ROUNDS", "WEYL", "keep", "keep_mask", "keep_scale", "masks",
    "threshold",
]  # fmt: skip
