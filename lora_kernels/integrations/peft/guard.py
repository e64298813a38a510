"""The guard of the patch: which calls of PEFT's LoRA layers are plain LoRA, for lora_linear.

operands_of() looks at the layer, misfit() at its input. Both are asked in every call, because what
they look at can change from one call to the next.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.checks import DTYPES, autocast_dtype
from lora_kernels.foreign import ForeignModule
from lora_kernels.ops.obstacle import is_hooked, is_transformed
from lora_kernels.quantization import FrozenWeight, NotFrozen, find

__all__ = [
    "BASES", "DEVICES", "LINEAR", "VARIANTS", "Beyond", "Fold", "NotFused", "Operands", "hooked",
    "misfit", "misfit_of_moment", "not_plain_module", "not_plain_tensor", "operands_of",
    "parameter",
]  # fmt: skip

_TENSORS = (Tensor, nn.Parameter)
DEVICES = ("cpu", "cuda", "meta")  # what the operators are registered for
_CPU = torch.device("cpu")
# The classes of modules that are taken, with the forwards that lora_linear replaces.
LINEAR: dict[type[nn.Module], Callable] = {nn.Linear: nn.Linear.forward}
_DROPOUTS: dict[type[nn.Module], Callable] = {
    nn.Dropout: nn.Dropout.forward,
    nn.Identity: nn.Identity.forward,
}
BASES: dict[type[nn.Module], Callable] = {**LINEAR}  # of base layers; patch_peft() adds Conv1D
# By the class of a variant of LoRA, what gives the magnitude or a NotFused; patch_peft() adds DoRA.
VARIANTS: dict[type, Callable] = {}


class Operands(NamedTuple):
    """What lora_linear takes besides x; weight is [N, K], a view if Conv1D stores [K, N].

    bias: None over a frozen weight, whose layer adds its own.
    """

    weight: Tensor | FrozenWeight
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    magnitude: Tensor | None = None


class NotFused(NamedTuple):
    """PEFT's own forward runs, for this reason."""

    reason: str


# (layer, adapter, their weights) -> a, b of lora_linear.
Fold = Callable[[ForeignModule, str, Tensor, Tensor], tuple[Tensor, Tensor] | NotFused]


class Beyond(NamedTuple):
    """What operands_of() takes of an adapter besides plain LoRA, for variants.py.

    That is any variant, and a bias of lora_B, which the caller looks at. linears: the classes of
    lora_A and lora_B, with their forwards. groups: b is in so many blocks, each for its own rows
    of a.
    """

    linears: dict[type[nn.Module], Callable]
    fold: Fold
    groups: int


def operands_of(
    layer: ForeignModule, adapter: str | None = None, beyond: Beyond | None = None
) -> Operands | NotFused:
    """The operands of a PEFT LoRA layer over a linear as it is now, or why PEFT's forward runs.

    adapter: one of the layer's; None: the one that is active. beyond: None for plain LoRA.
    """
    if layer.disable_adapters:
        return NotFused("its adapters are disabled")
    if layer.merged:
        return NotFused("its adapters are merged")
    if not layer.cast_input_dtype_enabled:
        return NotFused("casting of its input is disabled")
    children = layer._modules
    all_a = children["lora_A"]._modules
    name = adapter
    if name is None:
        active = [name for name in layer.active_adapters if name in all_a]
        if len(active) != 1:
            return NotFused(f"{len(active)} of its adapters are active")
        (name,) = active
    variants = getattr(layer, "lora_variant", None)
    if variants is None:
        return NotFused("PEFT is older than 0.16")
    magnitude = None
    if name in variants and beyond is None:
        kind = type(variants[name])
        if kind not in VARIANTS:
            return NotFused(f"its adapter is a {kind.__name__}")
        magnitude = VARIANTS[kind](layer, name)
        if isinstance(magnitude, NotFused):
            return magnitude

    base, lora_a = children["base_layer"], all_a[name]
    lora_b = children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    linears = LINEAR if beyond is None else beyond.linears
    frozen = _frozen_weight(base)
    if isinstance(frozen, NotFused):
        return frozen
    problem = (
        (hooked(base, "base_layer") if frozen else not_plain_module(base, "base_layer", BASES))
        or not_plain_module(lora_a, "lora_A", linears)
        or not_plain_module(lora_b, "lora_B", linears)
        or not_plain_module(dropout, "lora_dropout", _DROPOUTS)
    )
    if problem:
        return problem
    dropout_p = 0.0
    if type(dropout) is nn.Dropout and dropout.training:
        dropout_p = dropout.p
        if dropout.inplace or not 0.0 <= dropout_p < 1.0:
            return NotFused(f"lora_dropout is {dropout}")
    if beyond is None and (
        parameter(lora_a, "bias") is not None or parameter(lora_b, "bias") is not None
    ):
        return NotFused("its adapter has a bias")
    weight: Any = frozen
    bias = None
    if frozen is None:
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        problem = not_plain_tensor(weight, "base_layer.weight", 2) or (
            None if bias is None else not_plain_tensor(bias, "base_layer.bias", 1)
        )
        if problem:
            return problem
        if type(base) is not nn.Linear:
            weight = weight.T
    a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
    problem = not_plain_tensor(a, "lora_A.weight", 2) or not_plain_tensor(b, "lora_B.weight", 2)
    if problem:
        return problem
    groups = 1
    if beyond is not None:
        folded, groups = beyond.fold(layer, name, a, b), beyond.groups
        if isinstance(folded, NotFused):
            return folded
        a, b = folded
    if magnitude is not None and frozen is not None and not frozen.exact:
        return NotFused(f"its adapter is DoRA, and base_layer rounds x as well ({frozen.kind})")
    problem = _unfit(weight, a, b, bias, groups) or _unfit_magnitude(magnitude, weight)
    if problem:
        return problem
    if magnitude is not None and not layer.training:
        dropout_p = 0.0  # PEFT's DoRA asks the layer, and LoRA the dropout
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or scaling.device not in (a.device, _CPU):
            return NotFused(
                f"scaling is a tensor of shape {list(scaling.shape)} on {scaling.device}"
            )
    elif not isinstance(scaling, (float, int)) or not abs(scaling) < math.inf:
        return NotFused(f"scaling is {scaling!r}")
    return Operands(weight, a, b, bias, scaling, dropout_p, magnitude)


def misfit(x: Any, operands: Operands) -> NotFused | None:
    """Why PEFT's own forward runs for this x, here and now; None if lora_linear takes it."""
    weight = operands.weight
    if type(x) not in _TENSORS:
        return NotFused(f"x is a {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        return NotFused("x is not dense")
    if x.device != weight.device:
        return NotFused(f"x is on {x.device}, its weights on {weight.device}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return NotFused(f"x {list(x.shape)} does not fit weight {list(weight.shape)}")
    if isinstance(weight, FrozenWeight):
        problem = _misfit_of_frozen(x, weight, operands.magnitude is not None)
        if problem:
            return problem
    elif x.dtype != weight.dtype:
        narrow = torch.float64 not in (x.dtype, weight.dtype) and x.dtype in DTYPES
        if not narrow or autocast_dtype(x) is None:
            return NotFused(f"x is {x.dtype} and base_layer.weight {weight.dtype}")
    return misfit_of_moment()


def _frozen_weight(base: nn.Module) -> FrozenWeight | NotFused | None:
    """The frozen weight of a base layer, or why it has none; None if its weight is dense."""
    if type(base) in BASES and type(base._parameters.get("weight")) in _TENSORS:
        return None
    found = find(base)
    if not isinstance(found, NotFrozen):
        return found
    if type(base) in BASES and found.error is TypeError:
        return None  # its weight is of no known class, which is told below
    return NotFused(f"base_layer is a {type(base).__name__}: {found.reason}")


def _misfit_of_frozen(x: Tensor, weight: FrozenWeight, dora: bool) -> NotFused | None:
    """Why PEFT's own forward runs for this x over a frozen weight, which multiplies as it will."""
    if x.dtype not in DTYPES or x.dtype == torch.float64:
        return NotFused(f"x is {x.dtype}")
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype not in (dtype, torch.float32):
        return NotFused(f"x is {x.dtype} under an autocast to {dtype}")
    if dora and not weight.keeps_dtype and (dtype or x.dtype) != weight.product_dtype(x):
        return NotFused(f"its adapter is DoRA, x is {x.dtype} and base_layer multiplies otherwise")
    return None


def misfit_of_moment() -> NotFused | None:
    """Why PEFT's own forwards run here and now, whatever they are called with."""
    if _has_any_global_hook():
        return NotFused("there are hooks on all modules")
    if is_transformed():
        return NotFused("a transform of torch.func or forward-mode AD is active")
    return None


def _unfit(
    weight: Tensor | FrozenWeight, a: Tensor, b: Tensor, bias: Tensor | None, groups: int
) -> NotFused | None:
    """Why PEFT would raise an error, or compute in float64, while lora_linear would not."""
    (n, k), r = weight.shape, a.shape[0]
    if r == 0 or a.shape[1] != k or b.shape[0] != n or b.shape[1] * groups != r:
        return NotFused(
            f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit weight [{n}, {k}]"
        )
    if bias is not None and bias.shape[0] != n:
        return NotFused(f"base_layer.bias {list(bias.shape)} does not fit weight [{n}, {k}]")
    device = weight.device
    if not device == a.device == b.device or (bias is not None and bias.device != device):
        return NotFused("its weights are on several devices")
    if device.type not in DEVICES:
        return NotFused(f"there are no operators for {device.type}")
    if a.dtype != b.dtype:
        return NotFused(f"lora_A is {a.dtype} and lora_B {b.dtype}")
    if a.dtype == torch.float64 != weight.dtype:
        kind = weight.kind if isinstance(weight, FrozenWeight) else None
        return NotFused(f"its adapter is float64 and its base {weight.dtype or kind}")
    if bias is not None and bias.dtype != weight.dtype:
        return NotFused(f"base_layer.weight is {weight.dtype} and its bias {bias.dtype}")
    return None


def _unfit_magnitude(magnitude: Tensor | None, weight: Tensor | FrozenWeight) -> NotFused | None:
    if magnitude is None:
        return None
    shape, device, name = magnitude.shape, magnitude.device, "lora_magnitude_vector.weight"
    if shape[0] != weight.shape[0]:
        return NotFused(f"{name} {list(shape)} does not fit weight {list(weight.shape)}")
    if device != weight.device:
        return NotFused(f"{name} is on {device}, its weights on {weight.device}")
    if magnitude.dtype == torch.float64 != weight.dtype:
        return NotFused(f"{name} is float64 and its base {weight.dtype}")
    return None


def not_plain_module(module: nn.Module, name: str, forwards: dict) -> NotFused | None:
    """Why a call of module does more or other than one of these forwards on its weights."""
    kind = type(module)
    if kind not in forwards:
        return NotFused(f"{name} is a {kind.__name__}")
    if kind.forward is not forwards[kind]:
        return NotFused(f"{kind.__name__}.forward has been replaced")
    if "forward" in module.__dict__:
        return NotFused(f"{name} has a forward of its own")
    return hooked(module, name)


def hooked(module: nn.Module, name: str) -> NotFused | None:
    """Why a call of module does more than its forward."""
    return NotFused(f"{name} has hooks") if is_hooked(module) else None


def parameter(module: ForeignModule, name: str) -> Any:
    """module.name, which may be a plain tensor (FSDP, replicas), past nn.Module's slow lookup."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def not_plain_tensor(tensor: Any, name: str, dim: int) -> NotFused | None:
    """Why tensor is not a dense floating-point matrix or vector of PyTorch's own class."""
    if type(tensor) not in _TENSORS:
        return NotFused(f"{name} is a {type(tensor).__name__}")
    if tensor.dim() != dim or tensor.layout is not torch.strided:
        return NotFused(f"{name} is {tensor.layout} with {tensor.dim()} dimensions")
    if tensor.dtype not in DTYPES:
        return NotFused(f"{name} is {tensor.dtype}")
    return None
