"""In which dtype a CPU multiplies large matrices of 16 bits.

A CPU without instructions for bfloat16 or float16 multiplies such matrices more slowly than it
converts them to float32, multiplies and rounds once, which also loses less. The environment
variable LORA_KERNELS_CPU_PRODUCTS = auto | float32 | own is read in every call: "own" multiplies in
the operands' own dtype, "float32" all 16-bit products in float32, "auto" asks the CPU.
"""

import os

import torch
from torch import Tensor

__all__ = ["VALUES", "matmul", "product_dtype"]

VALUES = ("auto", "float32", "own")  # of the variable, the default first
_VARIABLE = "LORA_KERNELS_CPU_PRODUCTS"
_FEW_ROWS = 16  # in a forward of fewer, converting the weight takes longer than the product
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
_answers: dict[torch.dtype, bool] = {}


def product_dtype(
    dtype: torch.dtype, device: torch.device, rows: int, backward: bool = False
) -> torch.dtype:
    """In which dtype rows [rows, ...] of dtype are multiplied by a weight of the same dtype.

    Raises: ValueError if LORA_KERNELS_CPU_PRODUCTS has an unknown value.
    """
    if dtype not in _INSTRUCTIONS or device.type != "cpu":
        return dtype
    asked = os.environ.get(_VARIABLE, "auto")
    if asked not in VALUES:
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(VALUES)}, got {asked!r}")
    if asked == "float32":
        return torch.float32
    if asked == "own" or _has_instructions(dtype):
        return dtype
    return torch.float32 if backward or rows >= _FEW_ROWS else dtype


def matmul(left: Tensor, right: Tensor, backward: bool = False) -> Tensor:
    """left·right in the dtype in which left is multiplied here by a weight like right."""
    dtype = product_dtype(right.dtype, left.device, len(left), backward)
    return left.to(dtype) @ right.to(dtype)


def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies dtype by itself, as far as PyTorch knows; True if it does not."""
    if dtype not in _answers:
        _answers[dtype] = _ask_for_instructions(dtype)
    return _answers[dtype]


def _ask_for_instructions(dtype: torch.dtype) -> bool:
    try:
        known = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch does not tell
        return True
    if known.get("architecture") not in ("x86_64", "amd64"):
        return True
    return any(known.get(name, False) for name in _INSTRUCTIONS[dtype])


# torch.compile calls it and keeps the answer: it cannot trace what is asked of the CPU.
vars(_has_instructions)["_dynamo_marked_constant"] = True
