"""What the ops share: their registration with PyTorch, and how a call finds its implementation.

An op has no autograd formula: an autograd Function is built from a forward op and a backward op.
dispatch/ says whether kernels/ or reference/ computes a call. The first call that reaches the
kernels imports them, and triton with them.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.checks import is_autocast
from lora_kernels.dispatch import algorithm, fallback, first_use
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.dispatch.tma import is_tma_compliant
from lora_kernels.ops import first_call

__all__ = ["OP_LIBRARY", "binds_positionally", "compute", "define", "tma_if_asked"]

OP_LIBRARY = torch.library.Library("lora_kernels", "DEF")


# Ops that write to none of their operands, and that both algorithms compute.
_REPEATABLE = (
    "lora_linear_forward", "lora_linear_backward",
    "lora_shared_linear_forward", "lora_shared_linear_backward",
)  # fmt: skip
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
        OP_LIBRARY.impl(name, _without_autocast(implementation), key)
    for key in _FORMULAS if formula else _FORMULAS[:1]:
        OP_LIBRARY.impl(name, _without_autocast(formula or implementation), key)
    torch.library.register_fake(f"lora_kernels::{name}", fake, lib=OP_LIBRARY)
    return getattr(torch.ops.lora_kernels, name).default


def tma_if_asked(*matrices: Tensor | None) -> bool:
    """Whether descriptors hold the matrices; True, unasked, while no measurement depends on it."""
    return not algorithm.TABLE or is_tma_compliant(*matrices)


def compute(
    reference: ModuleType, name: str, shape: GemmShape, operands: tuple, typed: Sequence[Tensor]
):
    """The result that reference.name(*operands) specifies, by the algorithm chosen for shape.

    The module of the same name in kernels/ has a function of the same name, whose first argument is
    the algorithm. typed: the tensors whose dtypes decide which kernels are compiled.
    """
    chosen = algorithm.choose(shape)
    if chosen.name == "reference":
        return getattr(reference, name)(*operands)

    def by(chosen: str):
        if chosen == "reference":
            return getattr(reference, name)(*operands)
        kernels = _kernels_of(reference)
        first_call.prepare(getattr(reference, name), chosen, shape, operands)
        return getattr(kernels, name)(chosen, *operands)

    def what() -> tuple:
        dtypes = dict.fromkeys(tensor.dtype for tensor in typed if tensor is not None)
        small = ("small m",) if shape.m <= algorithm.SMALL_M else ()  # has kernels of its own
        return (name, *small, shape.device, *dtypes)

    if name in _REPEATABLE and algorithm.is_open(chosen) and first_use.is_asked(shape.device):
        chosen = chosen._replace(name=first_use.decide(shape, by))
    return fallback.run(chosen, what, by)


@functools.cache
def _kernels_of(reference: ModuleType) -> ModuleType:
    return importlib.import_module(reference.__name__.replace(".reference.", ".kernels."))


def _without_autocast(implementation: Callable) -> Callable:
    """implementation with autocast off: its operands have the right dtypes already."""

    @functools.wraps(implementation)
    def wrapper(first, *args):
        device = (first if isinstance(first, Tensor) else first[0]).device
        if not is_autocast(device):
            return implementation(first, *args)
        with torch.autocast(device.type, enabled=False):
            return implementation(first, *args)

    return wrapper


class _PositionalSignature(inspect.Signature):
    """A signature whose bind() takes all arguments by position, without a check."""

    class Bound(NamedTuple):
        args: tuple
        kwargs: dict

        def apply_defaults(self) -> None:
            """There are none to apply."""

    def bind(self, *args):
        return self.Bound(args, {})


def binds_positionally(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Makes apply() cheaper for a Function that always gets all arguments, by position.

    Function.apply binds its arguments to forward's signature in every call. The general bind()
    costs as much as a small product: 30 of the 75 µs of a forward.
    """
    function.forward.__signature__ = _PositionalSignature.from_callable(function.forward)
    return function
