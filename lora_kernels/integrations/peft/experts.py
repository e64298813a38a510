"""PEFT's LoRA over experts (target_parameters) on lora_grouped_linear.

PEFT wraps each parameter of an experts module in a ParamWrapper of its own, one around the other.
Its forward folds W + s·B·A for the whole stack of experts and runs the module on that. Here the
outermost wrapper computes what Transformers' experts compute, by layers/mixture.py.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.guard import (
    DEVICES,
    LINEAR,
    NotFused,
    misfit_of_moment,
    not_plain_module,
    not_plain_tensor,
    parameter,
)
from lora_kernels.layers.mixture import Update, interface, stack_names, weight_of

__all__ = [
    "Experts", "Versions", "experts_of", "misfit_of_experts", "versions",
]  # fmt: skip

# sha256 of the sources that this file stands in for, in the versions that it is written for.
_KNOWN = {
    "ParamWrapper.forward": "704fb56e52604110a6d4c497d21b3c76f7195a572570e8ce20a016ae587a7069",
    "ParamWrapper.get_delta_factors": (  # PEFT 0.21.2
        "821452c621a3c41abc2de4aab511450851fa9b1b32744e9cb335f6d1b1fe092f"
    ),
    "grouped_mm_experts_forward": (  # Transformers 5.23 and 5.24
        "54beecae8764c6e99e73d0a6c85f9120c9535d713647d099dd91da6c74e1f15e"
    ),
}
_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")  # one formula, for many rows and for few
_IDENTITY: dict[type[nn.Module], Callable] = {nn.Identity: nn.Identity.forward}


class Experts(NamedTuple):
    """An experts module of Transformers, and the updates of its parameters by their names."""

    module: ForeignModule
    updates: Mapping[str, Update]

    def weight(self, name: str) -> Tensor:
        """The stack of weights of this name, [E, N, K]."""
        return weight_of(self.module, name)


# ---- which calls ----


class Versions(NamedTuple):
    """What patch_peft() has found of the installed PEFT and Transformers.

    wrapper: the class ParamWrapper. unknown: why they are not known ones. interface: the code of
    the forward that Transformers gives every class of its experts interface. registry: what that
    asks for a forward by name. forwards: those that mixture.compute() stands in for.
    """

    wrapper: type[ForeignModule]
    unknown: NotFused | None
    interface: CodeType | None = None
    registry: Mapping[str, Callable] = MappingProxyType({})
    forwards: Mapping[str, Callable] = MappingProxyType({})


def versions(kind: type[ForeignModule], forward: Callable) -> Versions:
    """Of the class ParamWrapper with PEFT's forward."""
    try:
        from transformers.integrations import moe

        sources = (forward, kind.get_delta_factors, moe.grouped_mm_experts_forward)
        texts = [inspect.getsource(source.__code__) for source in sources]
    except (ImportError, AttributeError, OSError):
        return Versions(kind, NotFused("there is no source to know this PEFT and Transformers by"))
    for (name, known), text in zip(_KNOWN.items(), texts, strict=True):
        if hashlib.sha256(text.encode()).hexdigest() != known:
            return Versions(kind, NotFused(f"{name} is not that of a known version"))
    forwards = {name: getattr(moe, f"{name}_experts_forward") for name in _IMPLEMENTATIONS}
    return Versions(kind, None, interface(), moe.ALL_EXPERTS_FUNCTIONS, forwards)


def experts_of(layer: ForeignModule, versions: Versions) -> Experts | NotFused:
    """The experts that an outermost ParamWrapper wraps, or why PEFT's own forward runs."""
    if versions.unknown:
        return versions.unknown
    updates: dict[str, Update] = {}
    module = layer
    while isinstance(module, versions.wrapper):  # fully_shard derives classes of its own
        problem = None
        if module is not layer:
            known = {type(module): versions.wrapper.forward}
            problem = not_plain_module(module, "an inner wrapper", known)
        update = problem or _update_of(module)
        if isinstance(update, NotFused):
            return update
        updates[module.parameter_name] = update
        module = module._modules["base_layer"]
    problem = _not_plain_experts(module, versions)
    if problem:
        return problem
    for name, update in updates.items():
        problem = _unfit(module, name, update)
        if problem:
            return problem
    return Experts(module, updates)


def misfit_of_experts(
    hidden: Any, experts: Experts, args: tuple, kwargs: Mapping
) -> NotFused | None:
    """Why PEFT's own forward runs for this call; None if mixture.compute() takes it."""
    weight = parameter(experts.module, "down_proj")
    if kwargs or len(args) != 2:
        return NotFused("it is not called with hidden_states, top_k_index and top_k_weights")
    ids, weights = args
    for name, tensor, dim in (
        ("x", hidden, 2),
        ("top_k_index", ids, 2),
        ("top_k_weights", weights, 2),
    ):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dim() != dim:
            return NotFused(f"{name} is not a plain tensor of {dim} dimensions")
        if tensor.device != weight.device:
            return NotFused(f"{name} is on {tensor.device}, the experts on {weight.device}")
    if ids.shape != weights.shape or ids.shape[0] != hidden.shape[0] or ids.is_floating_point():
        return NotFused(f"top_k_index {list(ids.shape)} does not fit x {list(hidden.shape)}")
    if ids.shape[1] == 0:
        return NotFused("top_k_index has no expert for a token")
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= weight.shape[0]:
            return NotFused(f"top_k_index has numbers that no expert has: {low} to {high}")
    return misfit_of_moment()


def _update_of(wrapper: ForeignModule) -> Update | NotFused:
    """The active adapter's factors of a ParamWrapper, seen as those of a product x·Wᵀ."""
    if wrapper.disable_adapters:
        return NotFused("its adapters are disabled")
    if wrapper.merged:
        return NotFused("its adapters are merged")
    children = wrapper._modules
    all_a = children["lora_A"]._modules
    active = [name for name in wrapper.active_adapters if name in all_a]
    if len(active) != 1:
        return NotFused(f"{len(active)} of its adapters are active")
    (name,) = active
    if name in wrapper.lora_variant:
        return NotFused(f"its adapter is a {type(wrapper.lora_variant[name]).__name__}")
    if wrapper._param_ndim != 3:
        return NotFused(f"{wrapper.parameter_name} has {wrapper._param_ndim} dimensions")
    lora_a, lora_b = all_a[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    problem = (
        not_plain_module(lora_a, "lora_A", LINEAR)
        or not_plain_module(lora_b, "lora_B", LINEAR)
        or not_plain_module(dropout, "lora_dropout", _IDENTITY)
    )
    if problem:
        return problem
    if parameter(lora_a, "bias") is not None or parameter(lora_b, "bias") is not None:
        return NotFused("its adapter has a bias")
    a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
    problem = not_plain_tensor(a, "lora_A.weight", 2) or not_plain_tensor(b, "lora_B.weight", 2)
    if problem:
        return problem
    scaling, count = wrapper.scaling[name], wrapper.num_experts
    if not isinstance(scaling, (float, int)) or not abs(scaling) < math.inf:
        return NotFused(f"scaling is {scaling!r}")
    if a.shape[0] % count or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        return NotFused(
            f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit {count} experts"
        )
    # lora_A counts experts slowest, lora_B fastest.
    return Update(
        a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1), scaling
    )


def _not_plain_experts(module: ForeignModule, versions: Versions) -> NotFused | None:
    """Why module is not experts of Transformers that compute what mixture.compute() computes."""
    kind = type(module)
    if getattr(kind.forward, "__code__", None) is not versions.interface:
        return NotFused(f"{kind.__name__} is not of Transformers' experts interface")
    problem = _hooked(module, kind.__name__)
    if problem:
        return problem
    if module._is_expert_parallel:
        return NotFused("its experts are spread over processes")
    if hasattr(module, "parametrizations"):
        return NotFused("its parameters are parametrized")
    chosen = module.config._experts_implementation
    if chosen not in _IMPLEMENTATIONS:
        return NotFused(f"its experts_implementation is {chosen!r}")
    if versions.registry.get(chosen) is not versions.forwards[chosen]:
        return NotFused(f"its experts_implementation {chosen!r} is not that of Transformers")
    for name in stack_names(module):
        weight = parameter(module, name)
        problem = not_plain_tensor(weight, name, 3)
        if problem:
            return problem
        if weight.requires_grad:
            return NotFused(f"{name} is trained itself")
        if weight.device.type not in DEVICES:
            return NotFused(f"there are no operators for {weight.device.type}")
    return None


def _unfit(module: ForeignModule, name: str, update: Update) -> NotFused | None:
    """Why an update does not fit the parameter of this name."""
    if name not in stack_names(module):
        return NotFused(f"{name} is not a weight of its experts")
    count, n, k = weight_of(module, name).shape
    a, b = update.a, update.b
    if a.shape != (count, a.shape[1], k) or b.shape != (count, n, a.shape[1]):
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        return NotFused(f"{shapes} do not fit {name} [{count}, {n}, {k}]")
    weight = parameter(module, name)
    if not weight.device == a.device == b.device:
        return NotFused("its weights are on several devices")
    if a.dtype != b.dtype or (a.dtype == torch.float64 != weight.dtype):
        return NotFused(f"lora_A is {a.dtype}, lora_B {b.dtype} and {name} {weight.dtype}")
    return None


def _hooked(module: nn.Module, name: str) -> NotFused | None:
    return not_plain_module(module, name, {type(module): type(module).forward})
