"""Frozen weights of torchao: an nn.Linear whose weight is one of its tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.quantization.base import DENSE, TRAINED, FrozenWeight, NotFrozen

__all__ = ["linear"]


class Affine(FrozenWeight):
    """An Int8Tensor, Float8Tensor or NVFP4Tensor: their own dequantisation rounds once."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.layer.weight.detach()
        if type(weight).__name__ == "Int8Tensor" and _is_of_rows(weight):
            # The same bits in fewer passes: dequantize() takes up to ten times as long.
            codes = weight.qdata.to(torch.promote_types(dtype, torch.float32))
            if weight.zero_point is not None:
                codes.sub_(weight.zero_point)
            return codes.mul_(weight.scale).to(dtype)
        narrow = torch.float32 if dtype == torch.float64 else dtype
        return weight.dequantize(narrow).contiguous().to(dtype)


class Unpacked(FrozenWeight):
    """An IntxUnpackedToInt8Tensor: its forward rounds the weight to the weight's dtype."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.layer.weight.detach().dequantize().contiguous().to(dtype)


# Of each tensor: the value, the kind in words, whether x may have another dtype than the weight,
# and the attribute that says how it quantises x.
_TENSORS = {
    "Int8Tensor": (Affine, "int8", True, "act_quant_kwargs"),
    "Float8Tensor": (Affine, "float8", False, "act_quant_kwargs"),
    "NVFP4Tensor": (Affine, "nvfp4", False, "act_quant_kwargs"),
    "IntxUnpackedToInt8Tensor": (Unpacked, "intx", False, "activation_quantization"),
}


def _is_of_rows(weight: Any) -> bool:
    """Whether an Int8Tensor has a scale for each row."""
    return weight.scale.shape == (weight.shape[0], 1)


def linear(layer: ForeignModule) -> FrozenWeight | NotFrozen:
    """The weight of an nn.Linear. exact: the weight does not ask for x to be quantised too."""
    weight = layer._parameters.get("weight")
    kind = type(weight)
    if kind is nn.Parameter or kind is Tensor:
        return NotFrozen(DENSE, TypeError)
    known = _TENSORS.get(kind.__name__)
    if known is None or not kind.__module__.startswith("torchao."):
        return NotFrozen(
            f"its weight is a {kind.__module__}.{kind.__qualname__}; known are "
            f"{', '.join(_TENSORS)} of torchao",
            TypeError,
        )
    value, name, any_dtype, activation = known
    with torch._C.DisableTorchFunctionSubclass():  # attributes of tensors are slow without
        if weight.requires_grad:
            return NotFrozen(TRAINED)
        if getattr(weight, "act_pre_scale", None) is not None:
            return NotFrozen("its weight scales x first (act_pre_scale): quantise it without")
        return value(
            layer,
            tuple(weight.shape),
            weight.device,
            None if any_dtype else weight.dtype,
            name,
            getattr(weight, activation) is None,
        )
