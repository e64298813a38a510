"""What layers and functions take, and how their errors read.

An error names the layer or the function, the argument, what it must be and what it is.
"""

import contextlib
import math
import operator
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kernels.spec import LoraSpec, OutputSplits

if TYPE_CHECKING:
    from lora_kernels.quantization import FrozenWeight

__all__ = [
    "DTYPES", "autocast_dtype", "check_alpha", "check_device_and_dtype", "check_dropout",
    "check_dropout_p", "check_input", "check_magnitude", "check_operands", "check_rank",
    "check_scaling", "check_shape", "check_spec", "check_tensor", "check_weight", "dtype_name",
    "is_autocast", "layer_name", "without_autocast",
]  # fmt: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COMMON = ("cpu", "cuda")  # devices that surely have autocast
_OF_X = (torch.strided, torch.jagged)
_LARGEST = sys.float_info.max


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in a word: float32."""
    return str(dtype).removeprefix("torch.")


def layer_name(layer: str | nn.Module) -> str:
    """The name of a layer in errors: its class with its arguments; a function's own name."""
    return layer if isinstance(layer, str) else f"{type(layer).__name__}({layer.extra_repr()})"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x, weight and bias to, or None. It never casts adapters."""
    device_type = x.device.type
    if device_type not in _COMMON and not torch.amp.is_autocast_available(device_type):
        return None
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast casts nothing on device."""
    if not is_autocast(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is enabled on device, which may have none."""
    kind = device.type
    available = kind in _COMMON or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


# ---- hyperparameters ----


def check_rank(r, layer: str) -> int:
    """r as an int >= 0. Raises: ValueError that names it."""
    try:
        rank = operator.index(r)
    except TypeError:
        rank = -1
    if rank < 0 or isinstance(r, bool):
        raise ValueError(f"{layer}: r must be an integer >= 0, got {r!r}")
    return rank


def check_alpha(lora_alpha, layer: str):
    """lora_alpha unchanged if it is a finite real number. Raises: ValueError that names it."""
    try:
        finite = math.isfinite(lora_alpha)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{layer}: lora_alpha must be a finite number, got {lora_alpha!r}")
    return lora_alpha


def check_dropout(lora_dropout, layer: str) -> float:
    """lora_dropout as a float in [0, 1). Raises: ValueError that names it."""
    try:
        p = float(lora_dropout)
    except (TypeError, ValueError, OverflowError):
        p = math.nan
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{layer}: lora_dropout must be in [0, 1), got {lora_dropout!r}")
    return p


def check_spec(layer: str | nn.Module, spec: LoraSpec) -> None:
    """scaling is finite and dropout_p in [0, 1). Raises: TypeError, ValueError."""
    check_dropout_p(layer, spec.dropout_p)
    check_scaling(layer, spec.scaling)


def check_dropout_p(layer: str | nn.Module, dropout_p) -> None:
    """dropout_p is a number in [0, 1). Raises: TypeError, ValueError."""
    _check_number(layer, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{layer_name(layer)}: dropout_p must be in [0, 1), got {dropout_p!r}")


def check_scaling(layer: str | nn.Module, scaling) -> None:
    """scaling is a finite number. Raises: TypeError, ValueError."""
    _check_number(layer, "scaling", scaling)
    if not -_LARGEST <= scaling <= _LARGEST:
        raise ValueError(f"{layer_name(layer)}: scaling must be finite, got {scaling!r}")


def _check_number(layer: str | nn.Module, name: str, value) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{layer_name(layer)}: {name} must be a number, got {value!r}")


# ---- tensors ----


def check_tensor(
    layer: str | nn.Module, name: str, value, layouts: tuple[torch.layout, ...] = (torch.strided,)
) -> None:
    """value is a floating-point tensor of one of these layouts. Raises: TypeError."""
    if not isinstance(value, Tensor):
        problem = f"be a torch.Tensor, got {type(value).__name__}"
    elif value.layout not in layouts:
        problem = f"be dense, got {value.layout}"
    elif value.dtype not in DTYPES:
        problem = f"be float32, float16, bfloat16 or float64, got {value.dtype}"
    else:
        return
    raise TypeError(f"{layer_name(layer)}: {name} must {problem}")


def check_weight(layer: str | nn.Module, weight) -> None:
    """weight is a dense floating-point matrix. Raises: TypeError, ValueError."""
    try:
        check_tensor(layer, "weight", weight)
    except TypeError as error:
        way_out = "lora_linear takes the weight of a quantised layer as frozen_weight(layer)"
        raise TypeError(f"{error}; {way_out}") from None
    if weight.dim() != 2:
        raise ValueError(
            f"{layer_name(layer)}: weight must have shape [N, K], got {list(weight.shape)}"
        )


def check_shape(layer: str | nn.Module, x: Any, weight: "Tensor | FrozenWeight") -> None:
    """x is a dense or jagged tensor of floats [..., K] for weight [N, K].

    Raises: TypeError, ValueError.
    """
    check_tensor(layer, "x", x, _OF_X)
    in_features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{layer_name(layer)}: x must have shape [..., {in_features}], got {list(x.shape)}"
        )


def check_device_and_dtype(layer: str | nn.Module, x: Tensor, weight: Tensor) -> None:
    """x has weight's device and, unless autocast casts both, its dtype. Raises: ValueError."""
    if x.device != weight.device:
        problem = f"be on weight's device {weight.device}, got {x.device}"
    elif x.dtype != weight.dtype and autocast_dtype(x) is None:
        problem = f"have weight's dtype {weight.dtype}, got {x.dtype}"
    else:
        return
    raise ValueError(f"{layer_name(layer)}: x must {problem}")


def check_input(layer: str | nn.Module, x, weight: Tensor) -> None:
    """x fits a product with weight [N, K]. Raises: TypeError, ValueError."""
    check_shape(layer, x, weight)
    check_device_and_dtype(layer, x, weight)


def check_operands(
    layer: str | nn.Module,
    weight: "Tensor | FrozenWeight",
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    splits: OutputSplits,
) -> None:
    """lora_A, lora_B, bias and splits fit weight [N, K]. Raises: TypeError, ValueError."""
    (n, k), device = weight.shape, weight.device
    one_group = splits.enabled == (True,) and splits.sizes == (n,)  # nearly always
    if not (one_group or splits.fits(n)):
        OutputSplits.of(n, splits.enabled, splits.sizes, owner=layer_name(layer))  # raises
    check_tensor(layer, "lora_A", a)
    check_tensor(layer, "lora_B", b)
    if b.dim() != 2 or b.shape[1] < 1:
        _fail(layer, "lora_B", "have shape [rows, r] with r >= 1", list(b.shape))
    b_rows, r = b.shape
    if b_rows != splits.rows:
        _fail(layer, "lora_B", f"have {splits.rows} rows", list(b.shape))
    rank = r * splits.count
    if a.dim() != 2 or a.shape[0] != rank or a.shape[1] != k:
        _fail(layer, "lora_A", f"have shape [{rank}, {k}]", list(a.shape))
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != n:
            _fail(layer, "bias", f"have shape [{n}]", list(bias.shape))
        if bias.dtype != weight.dtype:
            _fail(layer, "bias", f"have weight's dtype {weight.dtype}", bias.dtype)
    if a.device == b.device == device and (bias is None or bias.device == device):
        return
    for name, operand in (("lora_A", a), ("lora_B", b), ("bias", bias)):
        if operand is not None and operand.device != device:
            _fail(layer, name, f"be on weight's device {device}", operand.device)


def check_magnitude(
    layer: str | nn.Module, magnitude: Any, weight: "Tensor | FrozenWeight"
) -> None:
    """magnitude has an entry for each row of weight [N, K]. Raises: TypeError, ValueError."""
    check_tensor(layer, "magnitude", magnitude)
    n, device = weight.shape[0], weight.device
    if magnitude.dim() != 1 or magnitude.shape[0] != n:
        _fail(layer, "magnitude", f"have shape [{n}]", list(magnitude.shape))
    if magnitude.device != device:
        _fail(layer, "magnitude", f"be on weight's device {device}", magnitude.device)


def _fail(layer: str | nn.Module, name: str, expected: str, value) -> None:
    raise ValueError(f"{layer_name(layer)}: {name} must {expected}, got {value}")
