"""What the ops share: their registration with PyTorch, and how a call finds its implementation.

An op has no autograd formula: an autograd Function is built from a forward op and a backward op.
dispatch/ says whether kernels/ or reference/ computes a call. The first call that reaches the
kernels imports them, and triton with them.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._C import (
    _are_functorch_transforms_active,
    _DisableAutocast,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import _profiler_enabled, forward_ad

from lora_kernels.dispatch import algorithm, fallback, first_use, measured
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.dispatch.tma import is_tma_compliant
from lora_kernels.ops import first_call

__all__ = [
    "OP_LIBRARY", "applier", "call_of", "compute", "define", "is_direct", "may_have_record",
    "tma_if_asked", "without_autocast",
]  # fmt: skip

_PLAIN = {Tensor, nn.Parameter}
OP_LIBRARY = torch.library.Library("lora_kernels", "DEF")


# Ops that write to none of their operands, and that the algorithms compute by other kernels.
_REPEATABLE = ("lora_linear_forward", "lora_linear_backward", "lora_shared_linear_forward")
# Other devices; tensors with a batch dimension of torch.func.vmap, or of is_grads_batched.
_FORMULAS = ("CompositeExplicitAutograd", "FuncTorchBatched", "Batched")


def define(
    name: str, schema: str, implementation: Callable, formula: Callable | None, fake: Callable
) -> Callable:
    """Registers lora_kernels::name and returns the op.

    implementation is for CPU and CUDA, fake for tracing. formula computes the same in PyTorch's
    operators, without a write in place, for all other devices and for batched tensors. None: the
    implementation serves all devices, and batched tensors are not taken.
    """
    OP_LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        OP_LIBRARY.impl(name, without_autocast(implementation), key)
    for key in _FORMULAS if formula else _FORMULAS[:1]:
        OP_LIBRARY.impl(name, without_autocast(formula or implementation), key)
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=OP_LIBRARY)
    return getattr(torch.ops.lora_kernels, name).default


def is_direct(first: Tensor, *others: Tensor | None) -> bool:
    """Whether an op's implementation may be called without PyTorch's dispatcher.

    The dispatcher costs more than an implementation does, and is for those who look at operators:
    tracing, modes, profilers, transforms, tensors that are more than their memory. Autograd is one,
    too, so the caller is a Function, or makes the call by one. first: x, or a gradient. others: the
    rest of the operands, on the same device.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _profiler_enabled()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or not (first.is_cpu or first.is_cuda)
        or first.layout is not torch.strided
        or first.is_nested
        or is_legacy_batchedtensor(first)
        or type(first) not in _PLAIN
        or first.is_neg()
    ):
        return False
    for other in others:
        if other is not None and (
            type(other) not in _PLAIN or other.is_neg() or other.layout is not torch.strided
        ):
            return False
    return True


def tma_if_asked(*matrices: Tensor | None) -> bool:
    """Whether descriptors hold the matrices; True, unasked, while no measurement depends on it."""
    return not algorithm.TABLE or is_tma_compliant(*matrices[:2])


def compute(
    reference: ModuleType,
    name: str,
    shape: Callable[[], GemmShape],
    operands: tuple,
    typed: Sequence[Tensor],
):
    """The result that reference.name(*operands) specifies, by the algorithm chosen for shape().

    The module of the same name in kernels/ has a function of the same name, whose first argument is
    the algorithm. typed: the tensors whose dtypes decide which kernels are compiled.
    """
    call = call_of(name, operands)
    if call is not None and call.record is not None:
        result = call.run()
        if result is not NotImplemented:
            return result
    gemm = shape()
    chosen = algorithm.choose(gemm)
    if chosen.name == "reference":
        algorithm.warn_of_machine(gemm.device)
        return getattr(reference, name)(*operands)

    def by(chosen: str):
        if chosen == "reference":
            return getattr(reference, name)(*operands)
        kernels = _kernels_of(reference)
        first_call.prepare(getattr(reference, name), chosen, gemm, operands)
        run = functools.partial(getattr(kernels, name), chosen, *operands)
        return run() if call is None else _records().observe(call, run)

    def what() -> tuple:
        dtypes = dict.fromkeys(tensor.dtype for tensor in typed if tensor is not None)
        words = ["small m"] * (gemm.m <= algorithm.SMALL_M)  # has kernels of its own
        words += [f"r <= {1 << (gemm.r - 1).bit_length()}", *["dropout"] * gemm.dropout]
        matrices = [tensor for tensor in typed if tensor is not None and tensor.dim() > 1]
        words += ["unaligned"] * (not is_tma_compliant(*matrices))
        return (name, *words, gemm.device, *dtypes)

    # A backward without dx has no large product, so it is the same by either algorithm.
    differs = name in _REPEATABLE and getattr(operands[-1], "x", True)
    if differs and algorithm.is_open(chosen) and first_use.is_asked(gemm.device):
        chosen = chosen._replace(name=first_use.decide(gemm, what, by))
    return fallback.run(chosen, what, by)


def call_of(name: str, operands: Sequence):
    """The call of the op as kernels/records.py knows it; None if it is none for the kernels."""
    records = _records()
    if records is None:
        return None
    depends = algorithm.TABLE, fallback.count(), measured.changes()
    return records.call_of(name, (algorithm.asked(), *operands), *depends)


def may_have_record(first: Tensor) -> bool:
    """Whether a call over first could have a record, see kernels/records.py."""
    records = _records()
    return records is not None and records.serves(first)


def _records() -> ModuleType | None:
    """kernels/records.py, once something else has imported it, and triton with it."""
    return sys.modules.get("lora_kernels.kernels.records")


@functools.cache
def _kernels_of(reference: ModuleType) -> ModuleType:
    with fallback.of_kernels():
        return importlib.import_module(reference.__name__.replace(".reference.", ".kernels."))


def without_autocast(implementation: Callable) -> Callable:
    """implementation with autocast off: its operands have the right dtypes already."""

    @functools.wraps(implementation)
    def wrapper(*args):
        if not _is_any_autocast_enabled():
            return implementation(*args)
        with _DisableAutocast():
            return implementation(*args)

    return wrapper


def applier(function: type[torch.autograd.Function]) -> Callable:
    """function.apply for all arguments by position, at a third of its cost to the host.

    Function.apply binds its arguments to forward's signature in every call, which costs as much as
    a small product. What traces or transforms knows apply itself alone.
    """
    # What apply ends in; PyTorch's types do not know it.
    below = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args):
        """The Function's apply, for all arguments by position."""
        if torch.compiler.is_compiling() or _are_functorch_transforms_active():
            return function.apply(*args)
        return below(*[unwrap_if_dead(arg) if type(arg) in _PLAIN else arg for arg in args])

    return apply
