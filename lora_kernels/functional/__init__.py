"""The public functions: documentation, checks, autocast and seeds; ops/ computes."""

from lora_kernels.functional.grouped_linear import lora_grouped_linear
from lora_kernels.functional.linear import (
    lora_forward,
    lora_linear,
    lora_merged_linear,
    lora_shared_linear,
)
from lora_kernels.functional.quantized_linear import quantized_forward

__all__ = [
    "lora_forward",
    "lora_grouped_linear",
    "lora_linear",
    "lora_merged_linear",
    "lora_shared_linear",
    "quantized_forward",
]
