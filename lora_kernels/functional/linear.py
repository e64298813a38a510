"""lora_linear, lora_merged_linear and lora_shared_linear.

This file documents them, checks arguments, and sees to autocast and seeds; ops/ computes, or the
formula of reference/ if an op cannot.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.fx import Proxy
from torch.nn import functional as F

from lora_kernels import checks
from lora_kernels.functional.dora import dora_forward
from lora_kernels.functional.operands import cast, of_formula, over_values, prepare, under_autocast
from lora_kernels.functional.quantized_linear import quantized_forward
from lora_kernels.functional.seeds import draw_like, like_drawn, seeds_for
from lora_kernels.functional.small import is_small, small_lora_linear
from lora_kernels.ops import shared_input
from lora_kernels.ops.library import is_direct, may_have_record
from lora_kernels.ops.linear import apply_lora_linear, repeat_lora_linear
from lora_kernels.ops.obstacle import is_jagged, obstacle
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference import formula
from lora_kernels.spec import DoraSpec, LoraSpec, OutputSplits

__all__ = ["lora_forward", "lora_linear", "lora_merged_linear", "lora_shared_linear"]

_P = ParamSpec("_P")
_Y = TypeVar("_Y")


def _recorded_by_fx(function: Callable[_P, _Y]) -> Callable[_P, _Y]:
    """function as one node of the graph if torch.fx.symbolic_trace records a call of it."""

    @functools.wraps(function)
    def wrapper(x, *args, **kwargs):
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_function", wrapper, (x, *args), kwargs)
        return function(x, *args, **kwargs)

    recorded: Any = wrapper  # of function's signature
    return recorded


@_recorded_by_fx
def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ.

    Shapes: x [..., K], weight [N, K] (any strides: pass ``w.T`` for one stored [K, N]),
    lora_A [R, K], lora_B [N, R], bias [N] -> y [..., N].
    Dtypes: float32, float16, bfloat16, float64; x, weight and bias share one (autocast sees to
    it), lora_A and lora_B may have another (float32 over a 16-bit base). A gradient has the dtype
    of its operand. Under autocast, kernels round float32 factors to its dtype where they multiply,
    as PyTorch does.
    dropout_p in [0, 1) acts on the x that lora_A sees, not on the x that weight sees. It acts in
    every call: a layer passes 0 in eval mode. The mask is a pure function of seed, row and column,
    see dropout/mask.py. seed: int64 tensor of one element on x's device; None draws one from
    PyTorch's generator of that device. Under torch.distributed no other rank draws the same one.
    For small float32 operands on a CPU, see functional/small.py, None means the mask of F.dropout.
    weight may also be ``frozen_weight(layer)`` of a quantised layer, which computes x·weightᵀ and
    its own bias by its own kernels; the backward multiplies by its weight made dense on the spot.
    x may be a nested tensor of layout torch.jagged. Wherever an op cannot compute, the formula runs
    in differentiable PyTorch: under the transforms of torch.func and forward-mode AD, while
    torch.jit.trace or torch.onnx.export records, for operands of another tensor class, and on
    devices other than CPU and CUDA. torch.fx records a call as one node. Under vmap the argument
    randomness says whether the samples share a seed that is drawn.
    magnitude [N], of any of these dtypes: DoRA. With m = magnitude / norm, for the norm of each row
    of weight + scaling·lora_B·lora_A, which every gradient takes for a constant,
    y = m∘(x·weightᵀ + scaling·(x·lora_Aᵀ)·lora_Bᵀ) + bias; with dropout, as in PEFT,
    y = x·weightᵀ + bias + (m - 1)∘(x_hat·weightᵀ) + scaling·m∘((x_hat·lora_Aᵀ)·lora_Bᵀ) for
    x_hat = dropout(x), which takes a second large product. m is 1 in a row of zeros. y must not
    change in place before the backward, which reads it for the gradient of magnitude.
    Raises: TypeError if an operand is not a dense floating-point tensor; ValueError if shapes,
    dtypes, devices or values do not fit; RuntimeError for a double backward through x and lora_B
    if lora_A does not require a gradient.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; DoRA: Liu et al. 2024, arXiv 2402.09353,
    section 4.
    """
    name = "lora_linear"
    if isinstance(weight, FrozenWeight):
        if bias is not None:
            raise ValueError(f"{name}: bias must be None: a frozen weight's layer adds its own")
    else:
        checks.check_weight(name, weight)
    if magnitude is not None:
        dora = DoraSpec(scaling, dropout_p, OutputSplits.whole(weight.shape[0]))
        return dora_forward(name, x, weight, lora_A, lora_B, bias, magnitude, dora, seed)
    spec = LoraSpec(scaling, dropout_p, OutputSplits.whole(weight.shape[0]))
    if isinstance(weight, FrozenWeight):
        return quantized_forward(name, x, weight, lora_A, lora_B, spec, seed)
    return lora_forward(name, x, weight, lora_A, lora_B, bias, spec, seed)


@_recorded_by_fx
def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    enable_lora: Sequence[bool],
    out_splits: Sequence[int] | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias, plus scaling·h_g·lora_B_gᵀ in the columns of each enabled group g.

    The columns of y fall into len(enable_lora) groups, of equal size or of the sizes in out_splits
    (query, key, value of grouped-query attention: ``out_splits=(4096, 1024, 1024)``). The g-th
    enabled group has rows [g·r, (g+1)·r) of lora_A, its own block of rows of lora_B, and
    h_g = dropout(x)·lora_A_gᵀ; all groups see the same dropout mask.

    Shapes: x [..., K], weight [N, K], lora_A [E·r, K], lora_B [sum of the enabled splits, r],
    bias [N] -> y [..., N], with E = number of enabled groups, at least one.
    Dtypes, dropout_p, seed, errors: as lora_linear; ValueError also if no group is enabled, or
    if enable_lora and out_splits do not fit each other or weight.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.2; loralib's MergedLinear.
    """
    name = "lora_merged_linear"
    checks.check_weight(name, weight)
    if isinstance(enable_lora, (list, tuple)):
        enable_lora = [bool(flag) for flag in enable_lora]
    splits = OutputSplits.of(weight.shape[0], enable_lora, out_splits, owner=name)
    if not any(splits.enabled):
        raise ValueError(f"{name}: enable_lora must enable a group, got {list(enable_lora)}")
    spec = LoraSpec(scaling, dropout_p, splits)
    return lora_forward(name, x, weight, lora_A, lora_B, bias, spec, seed)


@_recorded_by_fx
def lora_shared_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: Sequence[float] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_l = x·weight_lᵀ + bias_l + scaling_l·(dropout_l(x)·lora_A_lᵀ)·lora_B_lᵀ for each layer l.

    The results are those of lora_linear for each layer. x is read once for all low-rank products,
    and the layers add to one dx in place. Each layer has its own dropout mask.

    Shapes: x [..., K]; for each of L layers weight [N_l, K], lora_A [R, K] with one R for all,
    lora_B [N_l, R], bias [N_l] -> L tensors [..., N_l].
    Dtypes, dropout_p, errors: as lora_linear; ValueError also if the lists are empty or differ in
    length, or if R differs.
    scalings: None means 1 for each. seed: int64 tensor of L elements on x's device; None draws
    them.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; for the sharing, the fused QKV of
    unslothai/unsloth, which has no dropout.
    """
    name, count = "lora_shared_linear", len(weights)
    biases = [None] * count if biases is None else biases
    scalings = [1.0] * count if scalings is None else scalings
    lists = {"lora_As": lora_As, "lora_Bs": lora_Bs, "biases": biases, "scalings": scalings}
    for argument, values in lists.items():
        if len(values) != count or count == 0:
            raise ValueError(
                f"{name}: {argument} must have one entry for each of weights, which must not be "
                f"empty, got {len(values)} for {count} weights"
            )
    ranks = [a.shape[0] if isinstance(a, Tensor) and a.dim() else None for a in lora_As]
    if len(set(ranks)) > 1:
        raise ValueError(f"{name}: all lora_As must have the same number of rows, got {ranks}")
    layers, specs = list(zip(weights, lora_As, lora_Bs, biases, strict=True)), []
    for weight, scaling in zip(weights, scalings, strict=True):
        checks.check_weight(name, weight)
        specs.append(LoraSpec(scaling, dropout_p, OutputSplits.whole(weight.shape[0])))
    if any(obstacle(x, *layer) is not None for layer in layers):
        if seed is not None:
            seed = seeds_for(name, x, dropout_p, seed, count)
        seeds = [None] * count if seed is None else seed.split(1)
        alone = zip(layers, specs, seeds, strict=True)
        return tuple(lora_forward(name, x, *layer, spec, own) for layer, spec, own in alone)
    prepared = [prepare(name, x, *layer, spec) for layer, spec in zip(layers, specs, strict=True)]
    xs, weights, biases = zip(*prepared, strict=True)
    seeds = seeds_for(name, xs[0], dropout_p, seed, count)
    factors = zip(specs, lora_As, lora_Bs, strict=True)
    specs = [under_autocast(spec, xs[0], a, b) for spec, a, b in factors]
    operands = (*weights, *lora_As, *lora_Bs, *biases)
    return tuple(shared_input.lora_shared_linear(xs[0], seeds, tuple(specs), *operands))


def lora_forward(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    seed: Tensor | None = None,
) -> Tensor:
    """lora_linear and lora_merged_linear for a layer, which names itself in errors."""
    drawn = seed is None and isinstance(x, Tensor) and not x.is_nested
    free = drawn and x.is_cpu and obstacle(x, weight, a, b, bias) is None
    if free and is_small(x, weight, a, b, bias, spec):
        return small_lora_linear(x, weight, a, b, bias, spec)
    if drawn and is_direct(x, weight, a, b, bias):
        y = _repeat(x, weight, a, b, bias, spec) if may_have_record(x) else None
        if y is not None:
            return y
    elif obstacle(x, weight, a, b, bias) is not None:
        return _without_op(layer, x, weight, a, b, bias, spec, seed)
    x, weight, bias = prepare(layer, x, weight, a, b, bias, spec)
    seed = seeds_for(layer, x, spec.dropout_p, seed)
    spec = under_autocast(spec, x, a, b)
    return apply_lora_linear(x, weight, a, b, bias, seed, spec)


def _repeat(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, spec: LoraSpec
) -> Tensor | None:
    """y by the record of an earlier call of this kind, which has passed the checks, or None."""
    if _is_any_autocast_enabled():
        x, weight, bias = cast(x, weight, bias)
        spec = under_autocast(spec, x, a, b)
    like_seed = like_drawn(x.device) if spec.dropout_p else None
    return repeat_lora_linear(x, weight, a, b, bias, spec, like_seed, draw_like)


def _without_op(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    spec: LoraSpec,
    seed: Tensor | None,
) -> Tensor:
    """lora_forward if there is an obstacle: the formula in differentiable PyTorch."""
    if is_jagged(x):
        checks.check_shape(layer, x, weight)
        return over_values(x, lambda v: lora_forward(layer, v, weight, a, b, bias, spec, seed))
    operands = of_formula(layer, x, weight, a, b, bias, spec, seed)
    x, weight, bias, x_hat, dtype = operands
    y = F.linear(x, weight, bias)
    with checks.without_autocast(x.device) if isinstance(x, Tensor) else contextlib.nullcontext():
        return formula.with_update(y, x_hat, a, b, spec, dtype)[0]
