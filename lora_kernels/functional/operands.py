"""What the public functions make of their operands before an op, or the formula, computes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import checks
from lora_kernels.foreign import ForeignModule
from lora_kernels.functional.seeds import seeds_for
from lora_kernels.ops.obstacle import is_opaque, is_plain
from lora_kernels.reference import formula
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import DoraSpec, GroupedSpec, LoraSpec

_Spec = TypeVar("_Spec", LoraSpec, DoraSpec, GroupedSpec)

__all__ = ["cast", "of_formula", "over_values", "own_dropout", "prepare", "under_autocast"]


def prepare(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias as the op takes them, or an error that names the layer."""
    checks.check_weight(layer, weight)
    checks.check_shape(layer, x, weight)
    if bias is not None:
        checks.check_tensor(layer, "bias", bias)
    x, weight, bias = cast(x, weight, bias)
    checks.check_device_and_dtype(layer, x, weight)
    checks.check_operands(layer, weight, a, b, bias, spec.splits)
    checks.check_spec(layer, spec)
    return x, weight, bias


def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias in the dtype of autocast, if it is on."""
    dtype = checks.autocast_dtype(x)
    if dtype is not None and is_plain(type(weight)):  # other classes cast in their own way
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, weight, bias


def under_autocast(
    spec: _Spec, x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None
) -> _Spec:
    """spec for products of x in the dtype of autocast: they may round factors to that, too.

    dtype: in which x is multiplied, if not in its own.
    """
    dtype = dtype or x.dtype
    mixed = dtype.itemsize == 2 and (a.dtype != dtype or b.dtype != dtype)
    if not mixed or checks.autocast_dtype(x) != dtype:
        return spec
    return type(spec)(**{**vars(spec), "narrow": True})  # replace() takes twice as long


def of_formula(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, torch.dtype]:
    """x, weight and bias for the formula, dropout(x), and the dtype of the low-rank products."""
    if is_opaque(x):
        # While torch.fx records a layer, x has no dtype to look at.
        known = x if isinstance(x, Tensor) else layer.held_weight()
        x_hat = own_dropout(layer, x, spec.dropout_p, seed)
        return x, weight, bias, x_hat, accumulate_dtype(known.dtype)
    x, weight, bias = prepare(layer, x, weight, a, b, bias, spec)
    dtype = accumulate_dtype(x.dtype)
    seed = seeds_for(layer, x, spec.dropout_p, seed)
    return x, weight, bias, formula.dropped(x, seed, spec.dropout_p, dtype), dtype


def own_dropout(layer: str | ForeignModule, x: Any, dropout_p: float, seed: Tensor | None) -> Any:
    """dropout(x) by PyTorch's dropout, which knows how to be recorded, and nested tensors.

    A layer's own module goes into the record, so that train() and eval() still act on it.
    """
    if seed is not None and dropout_p > 0:
        if x.is_nested:
            raise TypeError(
                f"{checks.layer_name(layer)}: x must be dense or nested with layout=torch.jagged "
                f"if seed is given, got a nested tensor of layout torch.strided"
            )
        return formula.dropped(x, seed, dropout_p, accumulate_dtype(x.dtype))
    if not isinstance(layer, str):
        return layer.lora_dropout(x)
    return F.dropout(x, dropout_p) if dropout_p > 0 else x


def over_values(x: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """forward of a jagged x: of its values, which are one matrix in memory."""
    y = forward(x.values())
    return torch.nested.nested_tensor_from_jagged(
        y, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
