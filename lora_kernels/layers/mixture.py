"""What experts of Transformers compute, with low-rank updates of their stacks of weights.

A module of Transformers' experts interface has stacks of weights, gate_up_proj (or up_proj) and
down_proj: [E, N, K], or [E, K, N] if it is_transposed. has_gate, has_bias and has_post_expert_norm
say what lies between and behind the products.
"""

import sys
from collections.abc import Mapping
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.functional.operands import under_autocast
from lora_kernels.functional.seeds import seeds_for
from lora_kernels.ops.grouped_linear import lora_grouped_linear
from lora_kernels.spec import GroupedSpec

__all__ = ["Update", "compute", "interface", "stack_names", "unknown_options", "weight_of"]

# What Transformers' decorator sets on an experts module, as far as compute() knows it.
_OPTIONS = {
    "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated",
    "_is_expert_parallel",
}  # fmt: skip


class Update(NamedTuple):
    """The factors of a stack of weights, a [E, R, K] and b [E, N, R], and how they act."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout_p: float = 0.0


# ---- which modules ----


def interface() -> CodeType | None:
    """The code of the forward that every class of the experts interface has; None if none does."""
    probe = _probe()
    return None if probe is None else type(probe).forward.__code__


def unknown_options() -> set[str]:
    """What this version of Transformers says of its experts and compute() does not know."""
    probe = _probe()
    return set() if probe is None else set(vars(probe)) - set(vars(nn.Module())) - _OPTIONS


def _probe() -> nn.Module | None:
    if "transformers" not in sys.modules:
        return None
    try:
        from transformers.integrations.moe import use_experts_implementation
    except ImportError:  # before transformers 5
        return None

    class Probe(nn.Module):
        def __init__(self, config: None):
            super().__init__()

        def forward(self) -> None:
            """Replaced."""

    return use_experts_implementation(Probe)(None)


def stack_names(module: ForeignModule) -> tuple[str, str]:
    """The names of its two stacks of weights, in the order of the products."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def weight_of(module: ForeignModule, name: str) -> Tensor:
    """The stack [E, N, K] of this name, a view if the module stores [E, K, N]."""
    weight = getattr(module, name)
    return weight.mT if module.is_transposed else weight


# ---- what they compute ----


def compute(
    module: ForeignModule,
    updates: Mapping[str, Update],
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """What the experts module computes, with the updates of its stacks by their names.

    Shapes: hidden [T, H], ids and weights [T, top_k] -> [T, H].
    Source: grouped_mm_experts_forward of Transformers 5.
    """
    top_k, tokens = ids.shape[1], hidden.shape[0]
    sorted_ids, order = torch.sort(ids.reshape(-1))
    rows = order // top_k  # the token of each row
    numbers = torch.arange(module.num_experts, dtype=ids.dtype, device=ids.device)
    ends = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)

    up, down = stack_names(module)
    y = _product(module, up, updates, hidden, ends, sorted_ids, rows)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _product(module, down, updates, y, ends, sorted_ids, None)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(tokens, top_k, y.shape[1]).sum(1).to(hidden.dtype)


def _product(
    module: ForeignModule,
    name: str,
    updates: Mapping[str, Update],
    x: Tensor,
    ends: Tensor,
    ids: Tensor,
    index: Tensor | None,
) -> Tensor:
    """x·Wᵀ + bias by expert, with its update. Shapes: x [S, K], or [T, K] with index [S]."""
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if name not in updates:
        from transformers.integrations.moe import _grouped_linear

        x = x if index is None else x[index]
        bias = None if bias is None else bias[ids]
        return _grouped_linear(x, getattr(module, name), ends, bias, module.is_transposed)
    weight, update = weight_of(module, name), updates[name]
    spec = GroupedSpec((float(update.scaling),), (update.dropout_p,))
    seeds = seeds_for(module, x, update.dropout_p, None, weight.shape[0])
    x = x.to(weight.dtype)
    spec = under_autocast(spec, x, update.a, update.b)
    operands = (x, weight, update.a, update.b, bias)
    return lora_grouped_linear(operands, (ends, None, index), seeds, spec)
