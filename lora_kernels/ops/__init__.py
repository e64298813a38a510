"""Differentiable ops: schema, shapes for tracing, dispatch, and the autograd Function of each.

To import this package registers all of them.
"""

from lora_kernels.ops import (
    dequantize,
    dora,
    grouped_linear,
    linear,
    quantized_dora,
    quantized_linear,
    shared_input,
)

__all__ = [
    "dequantize",
    "dora",
    "grouped_linear",
    "linear",
    "quantized_dora",
    "quantized_linear",
    "shared_input",
]
