"""report(): every LoRA layer of a model, the package's own or PEFT's, and how it runs."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lora_kernels import checks, distributed
from lora_kernels.dispatch import algorithm
from lora_kernels.dispatch.algorithm import Algorithm, GemmShape
from lora_kernels.dispatch.tma import is_tma_compliant
from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.guard import NotFused, Operands, misfit, operands_of
from lora_kernels.integrations.peft.patch import patched_experts, unreached
from lora_kernels.integrations.peft.variants import folded_of
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.experts import LoRAExperts
from lora_kernels.layers.linear import LinearLayer
from lora_kernels.layers.mixture import weight_of
from lora_kernels.layers.multi_linear import MultiLoRALinear
from lora_kernels.layers.quantized_linear import LoRAQuantizedLinear
from lora_kernels.model.other_layers import INSTEAD, other_lora_layers
from lora_kernels.model.paths import join, named_modules
from lora_kernels.ops.obstacle import is_hooked, obstacle
from lora_kernels.quantization import FrozenWeight, NotFrozen, find
from lora_kernels.report_rows import Report, Row

__all__ = ["report"]


class Load(NamedTuple):
    """What a forward is asked about: its tokens, and a device in the place of the weights'."""

    tokens: int
    device: torch.device | None = None


def report(
    model: nn.Module,
    tokens: int = 4096,
    verbose: bool = False,
    *,
    device: str | torch.device | None = None,
) -> Report:
    """For every LoRA layer, on what it runs for so many tokens, and why.

    The result is a list of rows; as text it is a table with a line for each kind of layer, or with
    verbose for each layer; ``as_dict()`` is what JSON can hold. LoRA layers that are neither of
    this package nor PEFT's have no row; the text names them, and ``remark``.

    It says what the next forward and its backward would do with an input of the base weight's
    dtype: with the adapters that are active now, in the current mode and under the current
    autocast. Parameters that fully_shard has sharded are DTensors until a forward gathers them:
    call report inside of a forward.
    device: where a model without weights, on the device meta, is going to be; None for where it is.

    Raises: ValueError if tokens is not an integer >= 1; TypeError if model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {model!r}")
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"report: tokens must be an integer >= 1, got {tokens!r}")
    load = Load(tokens, None if device is None else torch.device(device))
    # If peft was never imported, the model has no layer of it.
    upstream = sys.modules.get("peft.tuners.lora.layer")
    rows: list[Row] = []
    outermost: dict[nn.Module, nn.Module] = {}
    for name, module in named_modules(model):
        if isinstance(module, LoRAExperts):
            rows += _own_experts_rows(name, module, load)
        elif isinstance(module, LoRALayer):
            rows.append(_own_row(name, module, load))
        elif upstream is not None and isinstance(module, upstream.LoraLayer):
            if not hasattr(module, "parameter_name"):
                rows.append(_peft_row(name, module, load))
                continue
            outermost.setdefault(module, module)
            outermost[module.base_layer] = outermost[module]
            rows.append(_experts_row(name, module, outermost[module], load))
    others = other_lora_layers(model)
    remark = others and f"These LoRA layers are not of this package: {others}. {INSTEAD}"
    return Report(rows, tokens, verbose, remark)


def report_of_layers(layers: Sequence[nn.Module], tokens: int = 4096) -> Report:
    """report() of layers of PEFT by themselves, whose names are those of their classes."""
    rows = []
    for layer in layers:
        found = report(nn.ModuleDict({"layer": layer}), tokens)
        rows += [row._replace(name=type(layer).__name__) for row in found]
    return Report(rows, tokens)


def _own_row(name: str, layer: LoRALayer, load: Load) -> Row:
    if isinstance(layer, MultiLoRALinear):
        return _multi_row(name, layer, load)
    if isinstance(layer, LoRAQuantizedLinear):
        return _quantised_row(name, layer, load)
    weight = layer.base_weight() if layer.has_base_weight else None
    taken, reason = None, ""
    if not layer.has_lora:
        reason = "it has no adapter (r = 0)"
    elif layer.merged:
        reason = "its adapter is merged"
    elif not isinstance(layer, LinearLayer):
        reason = "there are no kernels for it: it runs PyTorch's operators"
    elif type(layer).forward is not LinearLayer.forward or "forward" in layer.__dict__:
        reason = "it has a forward of its own"
    elif (why := _own_obstacle(layer)) is not None:
        reason = f"it runs PyTorch's operators: {why}"
    else:
        joined = layer.computed_together
        weights = [member.oriented(member.base_weight()) for member in joined]
        taken = _algorithm(weights, layer.r, layer.active_dropout_p(), load, layer.lora_B.dtype)
        if layer.use_dora:
            taken = _with_magnitude(taken)
        if len(joined) > 1:
            others = f"{len(joined) - 1} other layer{'s' * (len(joined) > 2)}"
            taken = taken._replace(reason=f"{taken.reason}; in one call with {others}")
    if isinstance(layer, LinearLayer) and weight is not None:
        weight = layer.oriented(weight)
    ranks = (layer.r,) if layer.has_lora else ()
    return _row(name, type(layer).__name__, *_outline(weight), ranks, taken, reason)


def _multi_row(name: str, layer: MultiLoRALinear, load: Load) -> Row:
    """A layer of several adapters; which of them run depends on the route."""
    ranks = tuple(spec.r for spec in layer.adapters.values())
    named = ", ".join(f"{adapter} (r={spec.r})" for adapter, spec in layer.adapters.items())
    weight = layer.oriented(layer.base_weight())
    taken = _algorithm([weight], max(ranks), 0.0, load)
    taken = taken._replace(reason=f"adapters {named} in one call; {taken.reason}")
    return _row(name, type(layer).__name__, *_outline(weight), ranks, taken, "")


def _quantised_row(name: str, layer: LoRAQuantizedLinear, load: Load) -> Row:
    weight, taken, reason = find(layer.base_layer), None, ""
    shape, kind = (layer.out_features, layer.in_features), type(layer.base_layer).__name__
    if isinstance(weight, NotFrozen):
        reason = f"its forward raises an error: {weight.reason}"
    elif type(layer).forward is not LoRAQuantizedLinear.forward or "forward" in layer.__dict__:
        reason = "it has a forward of its own"
    elif is_hooked(layer.base_layer) and not layer.use_dora:  # with it, they do not run
        reason = "base_layer has hooks"
    else:
        kind = _frozen_kind(weight)
        taken = _over_frozen(weight, layer.lora_A, layer.active_dropout_p(), load)
        if layer.use_dora:
            taken = _with_magnitude(taken)
    dtype = None if isinstance(weight, NotFrozen) else weight.dtype
    return _row(name, f"{type(layer).__name__}({kind})", shape, dtype, (layer.r,), taken, reason)


def _with_magnitude(taken: Algorithm) -> Algorithm:
    """The algorithm of DoRA, given LoRA's."""
    return taken._replace(reason=f"DoRA; {taken.reason}")


def _own_obstacle(layer: LinearLayer) -> str | None:
    weight = layer.oriented(layer.weight)
    magnitude = layer.lora_magnitude if layer.use_dora else None
    return obstacle(_example(weight), weight, layer.lora_A, layer.lora_B, layer.bias, magnitude)


def _own_experts_rows(name: str, layer: LoRAExperts, load: Load) -> list[Row]:
    """A row for each stack of weights with an update."""
    rows = []
    for stack, r in layer.r.items():
        weight, taken, reason = weight_of(layer, stack), None, ""
        a, b = (getattr(layer, factor) for factor in layer.factors_of(stack))
        if distributed.is_dtensor(weight):
            reason = "its weights are DTensors as they stand; if fully_shard gathers them, ask in "
            reason += "the forward"
        elif type(layer).forward is not LoRAExperts.forward or "forward" in layer.__dict__:
            reason = "it has a forward of its own"
        elif (why := obstacle(_example(weight[0]), weight, a, b, None)) is not None:
            reason = f"its forward raises NotImplementedError: {why}"
        else:
            taken = _algorithm([weight[0]], r, layer.active_dropout_p(), load)
            taken = taken._replace(reason=f"{weight.shape[0]} experts in one call; {taken.reason}")
        kind = f"{type(layer).__name__}({layer.experts_class.__name__}.{stack})"
        rows.append(_row(join(name, stack), kind, *_outline(weight), (r,), taken, reason))
    return rows


def _experts_row(name: str, layer: ForeignModule, outermost: nn.Module, load: Load) -> Row:
    """A wrapper of PEFT around one parameter of a module; the outermost computes them all."""
    base, found = layer.get_base_layer(), patched_experts(outermost)
    shape, dtype = _outline(getattr(base, layer.parameter_name, None))
    ranks = tuple(_rank(layer, name) for name in layer.active_adapters if name in layer.r)
    taken, reason = None, ""
    if isinstance(found, NotFused):
        reason = found.reason
    else:
        weight, update = found.weight(layer.parameter_name), found.updates[layer.parameter_name]
        shape = weight.shape
        taken = _algorithm([weight[0]], update.a.shape[1], 0.0, load)
        taken = taken._replace(reason=f"{shape[0]} experts in one call; {taken.reason}")
    kind = f"peft {type(layer).__name__}({type(base).__name__}.{layer.parameter_name})"
    return _row(name, kind, shape, dtype, ranks, taken, reason)


def _peft_row(name: str, layer: ForeignModule, load: Load) -> Row:
    base = layer.get_base_layer()
    shape, dtype = _outline(getattr(base, "weight", None))
    if len(shape) < 3 and hasattr(base, "in_features") and hasattr(base, "out_features"):
        shape = (base.out_features, base.in_features)  # a quantised weight is packed
    ranks = tuple(_rank(layer, name) for name in layer.active_adapters if name in layer.r)
    taken, reason = None, ""
    operands, words = _peft_operands(layer)
    kind = f"peft {type(layer).__name__}({type(base).__name__})"
    if not isinstance(operands, NotFused):
        weight = operands.weight
        shape = weight.shape
        if isinstance(weight, FrozenWeight):
            kind, dtype = f"peft {type(layer).__name__}({_frozen_kind(weight)})", weight.dtype
        else:
            operands = misfit(_example(weight), operands) or operands
    if isinstance(operands, NotFused):
        reason = operands.reason
        if reason.endswith("is a DTensor"):
            reason += " as it stands; if fully_shard gathers it, ask in the forward"
    else:
        a, b, p = operands.a, operands.b, operands.dropout_p
        if isinstance(weight, FrozenWeight):
            taken = _over_frozen(weight, a, p, load)
        else:
            taken = _algorithm([weight], a.shape[0], p, load, b.dtype)
        if operands.magnitude is not None:
            taken = _with_magnitude(taken)
        taken = taken._replace(reason="; ".join((*words, taken.reason)))
    return _row(name, kind, shape, dtype, ranks, taken, reason)


def _peft_operands(layer: ForeignModule) -> tuple[Operands | NotFused, tuple[str, ...]]:
    """What the patch computes a layer with, and what it says of a variant in words."""
    unfused = unreached(layer)
    if unfused is not None:
        return unfused, ()
    operands = operands_of(layer)
    if not isinstance(operands, NotFused):
        return operands, ()
    folded = folded_of(layer)
    return (folded, ()) if isinstance(folded, NotFused) else (folded.operands, folded.words)


def _outline(weight) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype of a weight; (), None if a layer has none of this name."""
    if not isinstance(weight, torch.Tensor):
        return (), None
    return tuple(weight.shape), weight.dtype


def _rank(layer: ForeignModule, adapter: str) -> int:
    """The rank of an adapter of a PEFT layer. Padding for hotswapping leaves layer.r as it was."""
    a = layer.lora_A[adapter] if adapter in layer.lora_A else None  # noqa: SIM401, a ModuleDict
    rows = getattr(a, "out_features", getattr(a, "out_channels", None))
    return layer.r[adapter] if rows is None else rows // getattr(layer, "num_experts", 1)


def _row(name, kind, shape, dtype, ranks, taken: Algorithm | None, reason: str) -> Row:
    chosen, why = (None, reason) if taken is None else taken
    return Row(name, kind, tuple(shape), ranks, dtype, taken is not None, chosen, why)


def _example(weight: torch.Tensor) -> torch.Tensor:
    """An input of no rows for weight [N, K]."""
    return torch.empty((0, weight.shape[1]), dtype=weight.dtype, device=weight.device)


def _algorithm(
    weights: Sequence[torch.Tensor],
    r: int,
    dropout_p: float,
    load: Load,
    lora_dtype: torch.dtype | None = None,
) -> Algorithm:
    """The forward's, of one layer or of those that one call computes for the same x.

    lora_dtype: that of the factors; None for x's.

    The reason names the backward's algorithm too if it is another.
    """
    n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    x = torch.empty((0, k), dtype=weights[0].dtype, device=load.device or weights[0].device)
    cast = checks.autocast_dtype(x)
    dtype = cast or x.dtype
    if dtype != x.dtype:  # with the strides that autocast gives them
        weights = [torch.empty_like(weight, dtype=dtype, device="meta") for weight in weights]
    dys = [torch.empty((0, w.shape[0]), dtype=dtype, device="meta") for w in weights]
    # Autocast rounds factors to 16 bits in products, as if they had its dtype.
    uniform = lora_dtype in (None, dtype) or (cast is not None and cast.itemsize == 2)
    shape = GemmShape(load.tokens, n, k, r, dtype, x.device, dropout_p > 0, uniform=uniform)
    forward = algorithm.choose(shape._replace(tma=is_tma_compliant(x, *weights)))
    backward = algorithm.choose(shape._replace(tma=is_tma_compliant(*dys, *weights), backward=True))
    if backward.name == forward.name:
        return forward
    both = f"{forward.reason}; backward: {backward.name}, {backward.reason}"
    return forward._replace(reason=both)


def _frozen_kind(weight: FrozenWeight) -> str:
    return f"{type(weight.layer).__name__} {weight.kind}"


def _over_frozen(weight: FrozenWeight, a: torch.Tensor, dropout_p: float, load: Load) -> Algorithm:
    """What adds the update to the layer's own product, and what computes the gradients."""
    n, k = weight.shape
    dtype = weight.dtype or a.dtype
    chosen = algorithm.choose(
        GemmShape(
            load.tokens, n, k, a.shape[0], dtype, load.device or weight.device, dropout_p > 0,
            backward=True, uniform=a.dtype == dtype,
        )
    )  # fmt: skip
    reason = "the layer's own product, then the update; backward by its weight made dense"
    return chosen._replace(reason=f"{reason}; {chosen.reason}")
