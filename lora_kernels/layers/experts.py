"""LoRAExperts: the experts of a mixture, stacked in parameters, with low-rank updates."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import checks, distributed
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers import mixture
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.merging import undisturbed
from lora_kernels.layers.mixture import Update
from lora_kernels.ops.obstacle import obstacle

__all__ = ["LoRAExperts", "unfit_experts", "unfit_stack"]

_WAY_OUT = "train it through PEFT's target_parameters instead, with patch_peft() for speed"
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def unfit_experts(module: ForeignModule) -> str | None:
    """Why module cannot become LoRAExperts, in words; None if it can."""
    if isinstance(module, LoRAExperts):
        return "it is a LoRA layer already"
    if hasattr(module, "parametrizations"):
        return f"its parameters are parametrized; {_WAY_OUT}"
    code = getattr(type(module).forward, "__code__", None)
    if code is None or code is not mixture.interface():
        return f"it is not of the experts interface of Transformers 5; {_WAY_OUT}"
    unknown = mixture.unknown_options()
    if unknown:
        return f"its Transformers has options of experts unknown here, {unknown}; {_WAY_OUT}"
    if module._is_expert_parallel:
        return f"its experts are spread over processes; {_WAY_OUT}"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    if distributed.is_managed(module) or any(
        map(distributed.is_dtensor, module._parameters.values())
    ):
        return "its weights are sharded: call apply_lora before fully_shard or FSDP"
    return None


def unfit_stack(module: ForeignModule, name: str) -> str | None:
    """Why the parameter of this name of an experts module can get no update; None if it can."""
    weight = module._parameters.get(name)
    if name not in mixture.stack_names(module) or weight is None or weight.dim() != 3:
        return f"only its stacks of weights can: {', '.join(mixture.stack_names(module))}"
    if not weight.is_floating_point():
        return f"it is {weight.dtype}, which no formula of LoRA can take"
    return None


class LoRAExperts(LoRALayer, nn.Module):
    """Experts of Transformers whose products are x·W_eᵀ + bias_e + s·(dropout(x)·A_eᵀ)·B_eᵀ.

    Takes the place of a module of Transformers' experts interface (Mixtral, Qwen3-MoE, GPT-OSS, ...
    in Transformers 5) and is called like it: hidden_states [T, H], top_k_index and top_k_weights
    [T, top_k] -> [T, H]. It holds the same parameters under the same names, frozen, and for each
    of target_parameters, such as down_proj, the factors ``lora_A_down_proj`` [E, r, in] and
    ``lora_B_down_proj`` [E, out, r], however the stack of weights is stored. lora_A starts Kaiming
    uniform for each expert, lora_B zero.

    r, lora_alpha: a number, or one for each parameter by name. target_parameters: None for both
    stacks. lora_dropout acts in training mode on the input of the low-rank part alone, with a mask
    for each expert. lora_dtype: dtype of the factors; None takes the weights'.
    Attributes: ``r``, ``lora_alpha`` and ``scaling``, each by the name of the parameter;
    ``lora_dropout``, an nn.Dropout; ``experts_class``, the class of the module that it is made of.

    The products run lora_grouped_linear whatever config._experts_implementation says, so neither
    a folded stack of weights nor a gradient of that size is ever made. The layer never merges:
    eval() computes on the fly, because a merged weight would be a second copy of all experts.
    Dtypes: as lora_linear; x is taken to the weights' dtype, and the result to x's.
    Raises: TypeError for a module that is not of the interface; ValueError for one that cannot be
    wrapped (sharded, spread over processes, parametrized, ...), for names of no stack, bad r,
    lora_alpha or lora_dropout, and in calls for shapes that do not fit. NotImplementedError in
    calls under torch.func's transforms, recorders and for tensors of other classes.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; PEFT's target_parameters.
    """

    r: Any  # by the name of the parameter, unlike other layers'; so are lora_alpha and scaling
    lora_alpha: Any
    scaling: Any
    __call__: Callable[..., Tensor]

    # Versions of Transformers that have no such option compute this.
    has_gate = True
    has_bias = has_post_expert_norm = is_transposed = False

    def __init__(
        self,
        experts: nn.Module,
        r: int | Mapping[str, int],
        lora_alpha: float | Mapping[str, float] = 1,
        lora_dropout: float = 0.0,
        target_parameters: Iterable[str] | None = None,
        lora_dtype: torch.dtype | None = None,
    ):
        kind, layer = type(experts).__name__, type(self).__name__
        reason = unfit_experts(experts)
        if reason is not None:
            error = TypeError if "not of the experts interface" in reason else ValueError
            raise error(f"{layer}: experts ({kind}): {reason}")
        stacks = mixture.stack_names(experts)
        chosen = list(stacks if target_parameters is None else target_parameters)
        if not chosen:
            raise ValueError(f"{layer}: target_parameters must name some of {stacks}, got none")
        for name in chosen:
            reason = unfit_stack(experts, name)
            if reason is not None:
                raise ValueError(f"{layer}: target_parameters: {name!r} of {kind}: {reason}")
        names = [name for name in experts._parameters if name in chosen]
        ranks = _by_name("r", r, names, layer)
        alphas = _by_name("lora_alpha", lora_alpha, names, layer)
        for name in names:
            if checks.check_rank(ranks[name], f"{layer} {name}") < 1:
                raise ValueError(f"{layer}: r must be >= 1, got {ranks[name]} for {name}")
            checks.check_alpha(alphas[name], f"{layer} {name}")
        dropout = checks.check_dropout(lora_dropout, layer)

        nn.Module.__init__(self)
        held = vars(experts)
        self.__dict__.update(held)
        self.__dict__.update({name: held[name].copy() for name in _OWN})
        self.experts_class: ForeignModule = type(experts)
        self.r, self.lora_alpha = ranks, alphas
        self.scaling = {name: alphas[name] / ranks[name] for name in names}
        self.lora_dropout = nn.Dropout(dropout).train(experts.training)
        self.merge_weights = self.merged = False
        for name in names:
            weight: Tensor = getattr(self, name)
            count, n, k = mixture.weight_of(self, name).shape
            dtype, device = lora_dtype or weight.dtype, weight.device
            a_shape, b_shape = (count, ranks[name], k), (count, n, ranks[name])
            for factor, shape in zip(self.factors_of(name), (a_shape, b_shape), strict=True):
                empty = torch.empty(shape, dtype=dtype, device=device)
                self.register_parameter(factor, nn.Parameter(empty))
            if weight.is_meta:
                self._undrawn = True
        experts.requires_grad_(False)
        self.reset_lora_parameters()

    # ---- the factors ----

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The names of the stacks that have an update, in the order of the parameters."""
        return tuple(self.r)

    @staticmethod
    def factors_of(name: str) -> tuple[str, str]:
        """What the factors of the stack of this name are called."""
        return f"lora_A_{name}", f"lora_B_{name}"

    @property
    def factor_names(self) -> tuple[str, ...]:
        return tuple(factor for name in self.r for factor in self.factors_of(name))

    @property
    def has_lora(self) -> bool:
        return True

    def reset_lora_parameters(self) -> None:
        for name in self.r:
            a, b = (getattr(self, factor) for factor in self.factors_of(name))
            bound = 1 / math.sqrt(a.shape[2])
            nn.init.uniform_(a, -bound, bound)
            nn.init.zeros_(b)

    # ---- the forward ----

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        p = self.active_dropout_p()
        updates = {}
        for name, scaling in self.scaling.items():
            a, b = (getattr(self, factor) for factor in self.factors_of(name))
            reason = obstacle(hidden_states, getattr(self, name), a, b, None)
            if reason is not None:
                raise NotImplementedError(
                    f"{type(self).__name__}: {reason}, and experts have no plain form for that"
                )
            updates[name] = Update(a, b, scaling, p)
        self._check_call(hidden_states, top_k_index, top_k_weights)
        return mixture.compute(self, updates, hidden_states, top_k_index, top_k_weights)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.experts_class._apply_gate(self, gate_up)

    def _check_call(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        layer, width = type(self).__name__, mixture.weight_of(self, self._first_stack).shape[2]
        if x.dim() != 2 or x.shape[1] != width:
            raise ValueError(
                f"{layer}: hidden_states must have shape [T, {width}], got {list(x.shape)}"
            )
        if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.is_floating_point():
            raise ValueError(
                f"{layer}: top_k_index must be integers of shape [{x.shape[0]}, top_k], got "
                f"{ids.dtype} {list(ids.shape)}"
            )
        if weights.shape != ids.shape:
            raise ValueError(
                f"{layer}: top_k_weights must have top_k_index's shape {list(ids.shape)}, got "
                f"{list(weights.shape)}"
            )

    @property
    def _first_stack(self) -> str:
        return mixture.stack_names(self)[0]

    # ---- merging ----

    def merging_obstacle(self) -> str:
        """Why the layer computes its update on the fly."""
        return "a merged weight would be a second copy of all experts"

    def merged_stack(self, name: str) -> Tensor:
        """The stack of this name with the update in it, rounded once. A copy, not differentiable.

        It is made expert by expert: beside the copy, no tensor of the stack's size.
        """
        held = getattr(self, name)
        with undisturbed(held):
            merged = distributed.full_tensor(held.detach()).clone()
            if name in self.r:
                acc = torch.promote_types(held.dtype, torch.float32)
                factors = (getattr(self, factor) for factor in self.factors_of(name))
                a, b = (distributed.full_tensor(factor.detach()) for factor in factors)
                for expert, a_e, b_e in zip(merged, a, b, strict=True):
                    delta = (b_e.to(acc) @ a_e.to(acc)).mul_(self.scaling[name])
                    expert.copy_((delta.T if self.is_transposed else delta).add_(expert))
            return distributed.distribute_like(merged, held)

    def extra_repr(self) -> str:
        return (
            f"{self.experts_class.__name__}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout.p}"
        )


def _by_name(argument: str, value, names: list[str], layer: str) -> dict:
    """value for each of names: one for all, or what a mapping says of each."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if set(value) != set(names):
        raise ValueError(f"{layer}: {argument} must have a number for each of {names}, got {value}")
    return {name: value[name] for name in names}
