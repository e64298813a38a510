"""Why plain PyTorch computes a call, and not an op: one function decides, in words.

An op is a single node with an autograd formula of its own. It takes plain tensors, in eager mode
and under torch.compile, torch.export and make_fx. The rest is for reference/formula.py.
"""

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_gradtrackingtensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad
from torch.fx import Proxy

__all__ = [
    "is_batched", "is_hooked", "is_jagged", "is_opaque", "is_plain", "is_transformed", "obstacle",
]  # fmt: skip

_PLAIN = (Tensor, nn.Parameter, type(None))
# Classes for which tracing, or a collective that is under way, stands in for plain tensors.
_STAND_INS = (
    "torch._subclasses.fake_tensor",
    "torch._subclasses.functional_tensor",
    "torch.distributed._functional_collectives",
)
_DEVICES = ("cpu", "cuda", "meta")
_NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "magnitude")


def obstacle(x, weight, a, b, bias, magnitude=None) -> str | None:
    """Why the op cannot take these operands here and now, in words; None if it can.

    Asked in every call: if nothing stands in the way, it takes less than half a microsecond.
    """
    if (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and type(bias) in _PLAIN
        and type(magnitude) in _PLAIN
        and forward_ad._current_level < 0
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
        and x is not None
        and (x.is_cuda or (x.is_cpu and not x.is_nested))
    ):
        return None
    operands = x, weight, a, b, bias, magnitude
    return _of_operands(*operands) or _of_moment(*operands)


def is_opaque(x) -> bool:
    """Whether the sizes of x are not numbers to look at.

    They are not while torch.fx or torch.jit.trace records, or if x is nested in strided layout.
    """
    if isinstance(x, Proxy) or _get_tracing_state() is not None:
        return True
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.strided


def is_jagged(x) -> bool:
    """Whether x is a nested tensor of layout torch.jagged."""
    return isinstance(x, Tensor) and x.layout is torch.jagged


def is_batched(dy: Tensor) -> bool:
    """Whether a backward runs for a batch of dy at once: under vmap, or by is_grads_batched."""
    return TransformType.Vmap in _transforms() or is_legacy_batchedtensor(dy)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is running."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of module, or a backward through it, does more than its forward says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain(kind: type[Tensor]) -> bool:
    """Whether tensors of this class take part in operations as plain ones do.

    A class that computes operations in its own way, as torchao's quantised weights do, knows
    PyTorch's and not this package's.
    """
    if kind in _PLAIN or kind.__module__ in _STAND_INS:
        return True
    way = kind.__torch_function__
    plain = getattr(way, "__func__", way) in (
        getattr(Tensor.__torch_function__, "__func__", None),
        torch._C._disabled_torch_function_impl,
    )
    return plain and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _of_operands(*operands) -> str | None:
    for name, tensor in zip(_NAMES, operands, strict=True):
        if isinstance(tensor, Proxy):
            return f"torch.fx records {name}"
        if not isinstance(tensor, Tensor):
            continue  # None, or a mistake that the checks name
        if tensor.is_nested:
            kind = "jagged" if tensor.layout is torch.jagged else "strided"
            return f"{name} is a nested tensor of layout {kind}"
        if not is_plain(type(tensor)):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device.type not in _DEVICES:
            return f"{name} is on {tensor.device}"
    return None


def _of_moment(*operands) -> str | None:
    if _are_functorch_transforms_active():
        if torch.compiler.is_dynamo_compiling():  # which cannot look at the transforms
            return "torch.compile traces a transform of torch.func"
        for kind in _transforms() - {TransformType.Grad}:
            return f"{kind.name.lower()} of torch.func is running"
        if not _saves_enough(*operands):
            return "torch.func may differentiate again by what the op does not save"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is running"
    if _get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    return "torch.onnx.export is recording" if torch.onnx.is_in_onnx_export() else None


def _saves_enough(*operands) -> bool:
    """Whether a second derivative is right, under torch.func.grad alone, if the op computes.

    The op saves what the innermost level differentiates by. An outer level, or the autograd around
    all of them, may differentiate by other operands.
    """
    if len(get_interpreter_stack()) > 1 or operands[-1] is not None:  # a magnitude
        return False
    by = []
    for operand in operands:
        wrapped = operand is not None and is_gradtrackingtensor(operand)
        by.append(wrapped and operand.requires_grad)
        outer = get_unwrapped(operand) if wrapped else operand
        if outer is not None and outer.requires_grad and not by[-1]:
            return False
    x, _, a, b, *_ = by
    return a or not (x and b)  # for lora_B it saves x·lora_Aᵀ, without x


def _transforms() -> set[TransformType]:
    """The kinds of torch.func's transforms that are running."""
    if not _are_functorch_transforms_active():
        return set()
    return {layer.key() for layer in get_interpreter_stack()}
