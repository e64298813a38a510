"""PEFT's lora.Linear on lora_linear: patch_peft(), unpatch_peft() and the guard between the two.

The patch replaces one method of one class and stores nothing on modules. A call that the guard does
not know runs PEFT's own forward.
"""

import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import checks, functional
from lora_kernels.spec import LoraSpec, OutputSplits

__all__ = ["Operands", "misfit", "operands_of", "patch_peft", "unpatch_peft", "unreached"]

# sha256 of the source of lora.Linear.forward in the versions of PEFT that the guard is written for.
_KNOWN_FORWARDS = {
    "b80200c828a5ba02b15e307c599bfe69c60152eb8d543d964af5cea5b024ec3c",  # 0.16.0 to 0.17.1
    "ec0a80f5c5ce05f5dd90027952bb5d29aaf910e9d2ab40486a90e8a03c7e1cd9",  # 0.18.0 to 0.21.2
}
_TENSORS = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")  # what the operators are registered for
_CPU = torch.device("cpu")
# The modules that are taken, and the forwards that lora_linear stands for. patch_peft() adds
# Hugging Face's Conv1D to the bases.
_LINEAR = {nn.Linear: nn.Linear.forward}
_DROPOUTS = {nn.Dropout: nn.Dropout.forward, nn.Identity: nn.Identity.forward}
_bases: dict[type[nn.Module], Callable] = {**_LINEAR}

_upstream: Callable | None = None  # PEFT's forward, while patched


class Operands(NamedTuple):
    """What lora_linear takes besides x; weight is [N, K], a view where Conv1D stores [K, N]."""

    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout_p: float


def patch_peft() -> None:
    """Has PEFT's LoRA layers over nn.Linear and Hugging Face's Conv1D run lora_linear.

    Replaces ``peft.tuners.lora.layer.Linear.forward``, for models that exist and models to come.
    Where a call is not plain LoRA, PEFT's own forward runs; ``report(model)`` says where and why.
    Without dropout the results are PEFT's within rounding; with dropout the masks are others.
    To be called before a model is compiled. Called again, it changes nothing.

    Warns: RuntimeWarning, once, where this version of PEFT has a forward that is not known.
    Raises: ImportError where peft is not installed.
    """
    global _upstream
    from peft.tuners.lora.layer import Conv1D, Linear

    if _upstream is None:
        _warn_unless_known(Linear.forward)
        _bases.setdefault(Conv1D, Conv1D.forward)
        _upstream, Linear.forward = Linear.forward, _patched(Linear.forward)


def unpatch_peft() -> None:
    """Gives PEFT its own forward back; without a patch it changes nothing.

    Raises: RuntimeError where something else has replaced the forward since patch_peft().
    """
    global _upstream
    if _upstream is None:
        return
    from peft.tuners.lora.layer import Linear

    if getattr(Linear.forward, "__wrapped__", None) is not _upstream:
        raise RuntimeError(
            "unpatch_peft: lora.Linear.forward has been replaced since patch_peft(); undo that "
            f"first, it is now {Linear.forward!r}"
        )
    Linear.forward, _upstream = _upstream, None


@functools.cache
def _warn_unless_known(forward: Callable) -> None:
    try:
        # Of the code object: inspect would look through a wrapper at what it wraps.
        source = inspect.getsource(forward.__code__)
    except (AttributeError, OSError):
        source = ""
    if hashlib.sha256(source.encode()).hexdigest() not in _KNOWN_FORWARDS:
        warnings.warn(
            "patch_peft: lora.Linear.forward of this PEFT is none that lora_kernels knows "
            "(those of 0.16.0 to 0.21.2). It is patched all the same: compare results with and "
            "without the patch",
            RuntimeWarning,
            stacklevel=3,
        )


def _patched(upstream: Callable) -> Callable:
    @functools.wraps(upstream)
    def forward(self, x, *args, **kwargs):
        if args or kwargs or torch.jit.is_tracing():
            return upstream(self, x, *args, **kwargs)
        operands = operands_of(self)
        if isinstance(operands, str) or misfit(x, operands) is not None:
            return upstream(self, x)
        weight, a, b, bias, scaling, dropout_p = operands
        if isinstance(scaling, Tensor):
            b, scaling = b * scaling, 1.0  # its value stays on the device
        spec = LoraSpec(scaling, dropout_p, OutputSplits.whole(weight.shape[0]))
        return functional.lora_forward(self, x, weight, a, b, bias, spec)

    return forward


def unreached(layer: nn.Module) -> str | None:
    """Why a call of this PEFT LoRA layer does not come to the patched forward; None where it does.

    Of a layer that is reached, operands_of() and misfit() tell the rest.
    """
    from peft.tuners.lora.layer import Linear

    if _upstream is None:
        return "patch_peft() has not been called"
    if type(layer).forward is not Linear.forward:
        return f"{type(layer).__name__} of PEFT has a forward of its own"
    if "forward" in layer.__dict__:
        # A hook of Accelerate keeps the method that it replaces.
        replaced = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
        if replaced is not Linear.forward:
            return "it has a forward of its own, such as a hook from before patch_peft()"
    return None


def operands_of(layer: nn.Module) -> Operands | str:
    """The operands of a PEFT lora.Linear as it stands, or why PEFT's own forward runs."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is disabled"
    children = layer._modules
    all_a = children["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in all_a]
    if len(active) != 1:
        return f"{len(active)} of its adapters are active"
    name = active[0]
    variants = getattr(layer, "lora_variant", None)
    if variants is None:
        return "PEFT is older than 0.16"
    if name in variants:
        return f"its adapter is a {type(variants[name]).__name__}"

    base, lora_a = children["base_layer"], all_a[name]
    lora_b = children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    problem = (
        _not_plain_module(base, "base_layer", _bases)
        or _not_plain_module(lora_a, "lora_A", _LINEAR)
        or _not_plain_module(lora_b, "lora_B", _LINEAR)
        or _not_plain_module(dropout, "lora_dropout", _DROPOUTS)
    )
    if problem:
        return problem
    dropout_p = 0.0
    if type(dropout) is nn.Dropout and dropout.training:
        dropout_p = dropout.p
        if dropout.inplace or not 0.0 <= dropout_p < 1.0:
            return f"lora_dropout is {dropout}"
    if _parameter(lora_a, "bias") is not None or _parameter(lora_b, "bias") is not None:
        return "its adapter has a bias"
    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    a, b = _parameter(lora_a, "weight"), _parameter(lora_b, "weight")
    problem = (
        _not_plain_tensor(weight, "base_layer.weight", 2)
        or _not_plain_tensor(a, "lora_A.weight", 2)
        or _not_plain_tensor(b, "lora_B.weight", 2)
        or (bias is not None and _not_plain_tensor(bias, "base_layer.bias", 1))
    )
    if problem:
        return problem
    if type(base) is not nn.Linear:
        weight = weight.T
    problem = _unfit(weight, a, b, bias)
    if problem:
        return problem
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or scaling.device not in (a.device, _CPU):
            return f"scaling is a tensor of shape {list(scaling.shape)} on {scaling.device}"
    elif not isinstance(scaling, (float, int)) or not abs(scaling) < math.inf:
        return f"scaling is {scaling!r}"
    return Operands(weight, a, b, bias, scaling, dropout_p)


def misfit(x, operands: Operands) -> str | None:
    """Why PEFT's own forward runs for this x, here and now; None where lora_linear takes it."""
    weight = operands.weight
    if type(x) not in _TENSORS:
        return f"x is a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not dense"
    if x.device != weight.device:
        return f"x is on {x.device}, its weights on {weight.device}"
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"x {list(x.shape)} does not fit weight {list(weight.shape)}"
    if x.dtype != weight.dtype:
        narrow = torch.float64 not in (x.dtype, weight.dtype) and x.dtype in _DTYPES
        if not narrow or checks.autocast_dtype(x) is None:
            return f"x is {x.dtype} and base_layer.weight {weight.dtype}"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode AD is active"
    return None


def _unfit(weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> str | None:
    """Why PEFT would raise, or compute in float64, where lora_linear does otherwise."""
    (n, k), r = weight.shape, a.shape[0]
    if r == 0 or a.shape[1] != k or b.shape[0] != n or b.shape[1] != r:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit weight [{n}, {k}]"
    if bias is not None and bias.shape[0] != n:
        return f"base_layer.bias {list(bias.shape)} does not fit weight [{n}, {k}]"
    device = weight.device
    if not device == a.device == b.device or (bias is not None and bias.device != device):
        return "its weights are on several devices"
    if device.type not in _DEVICES:
        return f"there are no operators for {device.type}"
    if a.dtype != b.dtype:
        return f"lora_A is {a.dtype} and lora_B {b.dtype}"
    if a.dtype == torch.float64 != weight.dtype:
        return f"its adapter is float64 and its base {weight.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"base_layer.weight is {weight.dtype} and its bias {bias.dtype}"
    return None


def _not_plain_module(module: nn.Module, name: str, forwards: dict) -> str | None:
    """Why calling module is not the same as one of these forwards on its weights."""
    kind = type(module)
    if kind not in forwards:
        return f"{name} is a {kind.__name__}"
    if kind.forward is not forwards[kind]:
        return f"{kind.__name__}.forward has been replaced"
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    if hooked:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    return None


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """module.name, which may be a plain tensor (FSDP, replicas), past nn.Module's slow lookup."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def _not_plain_tensor(tensor, name: str, dim: int) -> str | None:
    """Why tensor is not a dense floating-point matrix or vector without ways of its own."""
    if type(tensor) not in _TENSORS:
        return f"{name} is a {type(tensor).__name__}"
    if tensor.dim() != dim or tensor.layout is not torch.strided:
        return f"{name} is {tensor.layout} with {tensor.dim()} dimensions"
    if tensor.dtype not in _DTYPES:
        return f"{name} is {tensor.dtype}"
    return None
