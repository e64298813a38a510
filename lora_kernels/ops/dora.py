"""The op behind lora_linear with a magnitude (DoRA)."""

import functools

import torch
from torch import Tensor

from lora_kernels.ops.library import applier, compute, define
from lora_kernels.ops.linear import backward_fake, backward_shape, forward_shape
from lora_kernels.reference import dora as reference
from lora_kernels.reference import dora_formula, formula
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import DoraNeeds, DoraSpec, Needs, OutputSplits

__all__ = [
    "DoraLinear", "apply_dora_linear", "differentiable_backward", "dora_backward", "dora_forward",
    "to_save",
]  # fmt: skip


def _forward(x, w, a, b, bias, magnitude, seed, *constants):
    spec, operands = _spec(w.shape[0], *constants), (x, w, a, b, bias, magnitude, seed)
    shape = functools.partial(forward_shape, x, w, b, spec.dropout_p, spec.narrow)
    return compute(reference, "dora_forward", shape, (*operands, spec), operands)


def _backward(dy, x, h, w, a, b, bias, magnitude, seed, norm, kept, *constants):
    operands = dy, x, h, w, a, b, bias, magnitude, seed, norm, kept
    spec, needs = _unpacked(dy.shape[-1], *constants)
    shape = functools.partial(backward_shape, dy, x, w, a, b, spec.dropout_p, spec.narrow)
    return compute(reference, "dora_backward", shape, (*operands, spec, needs), operands)


def _forward_formula(x, w, a, b, bias, magnitude, seed, *constants):
    spec = _spec(w.shape[0], *constants)
    return dora_formula.dora_forward(x, w, a, b, bias, magnitude, seed, spec)


def _backward_formula(dy, x, h, w, a, b, bias, magnitude, seed, norm, kept, *constants):
    operands = dy, x, h, w, a, b, bias, magnitude, seed, norm, kept
    return dora_formula.dora_backward(*operands, *_unpacked(dy.shape[-1], *constants))


def _spec(
    n: int, scaling: float, dropout_p: float, low_rank_only: bool, narrow: bool = False
) -> DoraSpec:
    return DoraSpec(scaling, dropout_p, OutputSplits.whole(n), narrow, low_rank_only)


def _unpacked(
    n: int, scaling, dropout_p, low_rank_only, needs, narrow=False
) -> tuple[DoraSpec, DoraNeeds]:
    return _spec(n, scaling, dropout_p, low_rank_only, narrow), DoraNeeds(*needs)


def _forward_fake(x, w, a, b, bias, magnitude, seed, *constants):
    m, n, acc = x.numel() // x.shape[-1], w.shape[0], accumulate_dtype(x.dtype)
    y = x.new_empty((*x.shape[:-1], n))
    h, norm = x.new_empty((m, a.shape[0]), dtype=acc), x.new_empty((n,), dtype=acc)
    drops = _spec(n, *constants).drops_product
    return [y, h, norm, *([x.new_empty((m, n))] if drops else [])]


def _backward_fake(dy, x, h, w, a, b, bias, magnitude, seed, norm, kept, *constants):
    *needs, needs_magnitude = _unpacked(dy.shape[-1], *constants)[1]
    grads = backward_fake(dy, x, w, a, b, Needs(*needs))
    return [*grads, magnitude.new_empty(magnitude.shape)] if needs_magnitude else grads


_forward_op = define(
    "dora_forward",
    "(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor magnitude, Tensor? seed, "
    "float scaling, float dropout_p, bool low_rank_only, bool narrow=False) -> Tensor[]",
    _forward,
    _forward_formula,
    _forward_fake,
)
_backward_op = define(
    "dora_backward",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor? w, Tensor? a, Tensor? b, Tensor? bias, "
    "Tensor magnitude, Tensor? seed, Tensor norm, Tensor? kept, float scaling, "
    "float dropout_p, bool low_rank_only, bool[] needs, bool narrow=False) -> Tensor[]",
    _backward,
    _backward_formula,
    _backward_fake,
)


def dora_forward(x, w, a, b, bias, magnitude, seed, spec: DoraSpec) -> list[Tensor]:
    """y, h, norm and perhaps c, as reference.dora specifies them, by the op."""
    constants = spec.scaling, spec.dropout_p, spec.low_rank_only, spec.narrow
    return _forward_op(x, w, a, b, bias, magnitude, seed, *constants)


def dora_backward(operands: tuple[Tensor | None, ...], spec: DoraSpec, needs: DoraNeeds):
    """The gradients that needs asks for, as reference.dora specifies them, by the op.

    operands: dy, x, h, w, a, b, bias, magnitude, seed, norm, kept.
    """
    constants = spec.scaling, spec.dropout_p, spec.low_rank_only, needs, spec.narrow
    return _backward_op(*operands, *constants)


def to_save(
    needs: DoraNeeds, spec: DoraSpec, x, h, w, a, b, bias, magnitude, seed, norm, y, c=None
) -> tuple[Tensor | None, ...]:
    """The operands of dora_backward besides dy, None for what these gradients do not depend on."""
    drops = spec.drops_product
    return (
        x if needs.w or needs.a or needs.magnitude or (needs.x and needs.b) else None,
        h if needs.b or needs.magnitude else None,
        w if needs.x or needs.magnitude else None,
        a if needs.x or needs.a else None,
        b if needs.x or needs.a or needs.b or needs.magnitude else None,
        bias if needs.magnitude and not drops else None,
        magnitude,
        seed,
        norm,
        (c if drops else y) if needs.magnitude else None,
    )


class DoraLinear(torch.autograd.Function):
    """Saves what the backward will read of x, h, the seed and the parameters, and y, or c for y."""

    @staticmethod
    def forward(x, w, a, b, bias, magnitude, seed, spec):
        return tuple(dora_forward(x, w, a, b, bias, magnitude, seed, spec))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, a, b, bias, magnitude, seed, ctx.spec = inputs
        y, h, norm, *c = output
        ctx.mark_non_differentiable(h, norm, *c)
        ctx.set_materialize_grads(False)
        ctx.needs = needs = DoraNeeds(*ctx.needs_input_grad[:6])
        ctx.save_for_backward(
            *to_save(needs, ctx.spec, x, h, w, a, b, bias, magnitude, seed, norm, y, *c)
        )

    @staticmethod
    def backward(ctx, dy, *_):
        needs = ctx.needs
        if dy is None or not any(needs):
            return (None,) * 8  # one for each argument of forward
        operands = (dy, *ctx.saved_tensors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(operands, ctx.spec, needs)
        else:
            grads = dora_backward(operands, ctx.spec, needs)
        return (*needs.spread(grads), None, None)


apply_dora_linear = applier(DoraLinear)


def differentiable_backward(operands, spec: DoraSpec, needs: DoraNeeds) -> list[Tensor]:
    """dora_backward by the formula, for create_graph=True: it can be differentiated again."""
    dy, x, h, w, a, b, bias, magnitude, seed, norm, kept = operands
    if (needs.b or needs.magnitude) and x is not None and a is not None:
        h = formula.low_rank_input(x, a, seed, spec.dropout_p)
    return dora_formula.dora_backward(
        dy, x, h, w, a, b, bias, magnitude, seed, norm, kept, spec, needs
    )
