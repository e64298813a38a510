"""The op behind lora_grouped_linear: low-rank products by segments of rows."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.table import GemmShape
from lora_kernels.ops.library import compute, define, tma_if_asked
from lora_kernels.ops.obstacle import is_batched
from lora_kernels.reference import grouped_formula as formula
from lora_kernels.reference import grouped_linear as reference
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import GroupedSpec, Needs

__all__ = ["lora_grouped_linear"]


def _forward(x, w, a, b, bias, ends, groups, index, seeds, *constants):
    spec = _spec(*constants)
    shape = functools.partial(_shape, x if index is None else index, x, w, a, ends, spec)
    operands = (x, w, a, b, bias, ends, groups, index, seeds)
    typed = (x, w, a, b, bias)
    return compute(reference, "lora_grouped_linear_forward", shape, (*operands, spec), typed)


def _backward(dy, x, h, w, a, b, ends, groups, index, seeds, sources, *constants):
    spec, needs = _unpacked(*constants)
    shape = functools.partial(_shape, dy, dy, w, a, ends, spec, backward=True)
    operands = (dy, x, h, w, a, b, ends, groups, index, seeds, sources, spec, needs)
    return compute(reference, "lora_grouped_linear_backward", shape, operands, (dy, w, a, b))


def _spec(scalings, dropout_ps, narrow=False) -> GroupedSpec:
    return GroupedSpec(tuple(scalings), tuple(dropout_ps), narrow)


def _unpacked(scalings, dropout_ps, needs, narrow=False) -> tuple[GroupedSpec, Needs]:
    return _spec(scalings, dropout_ps, narrow), Needs(*needs)


def _shape(rows, like, w, a, ends, spec, backward=False) -> GemmShape:
    """What the algorithm is chosen by: without a segment the product counts as empty."""
    return GemmShape(
        m=rows.shape[0] if ends.shape[0] else 0,
        n=w.shape[-2],
        k=w.shape[-1],
        r=a.shape[1],
        dtype=like.dtype,
        device=like.device,
        dropout=spec.drops,
        tma=tma_if_asked(like, w),
        backward=backward,
    )


def _forward_fake(x, w, a, b, bias, ends, groups, index, *_):
    count = x.shape[0] if index is None else index.shape[0]
    y = x.new_empty((count, w.shape[-2]))
    return y, x.new_empty((count, a.shape[1]), dtype=accumulate_dtype(x.dtype))


def _backward_fake(dy, x, h, w, a, b, ends, groups, index, seeds, sources, *constants):
    _, needs = _unpacked(*constants)
    grads = []
    if needs.x:
        grads.append(dy.new_empty((sources, w.shape[-1])))
    if needs.w:
        grads.append(dy.new_empty(w.shape))
    if needs.a:
        grads.append(a.new_empty(a.shape))
    if needs.b:
        grads.append(b.new_empty(b.shape))
    if needs.bias:
        grads.append(dy.new_empty(w.shape[:-1]))
    return grads


_forward_op = define(
    "lora_grouped_linear_forward",
    "(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor ends, Tensor? groups, "
    "Tensor? index, Tensor? seeds, float[] scalings, float[] dropout_ps, bool narrow=False) "
    "-> (Tensor, Tensor)",
    _forward,
    None,
    _forward_fake,
)
_backward_op = define(
    "lora_grouped_linear_backward",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor w, Tensor a, Tensor b, Tensor ends, "
    "Tensor? groups, Tensor? index, Tensor? seeds, SymInt sources, float[] scalings, "
    "float[] dropout_ps, bool[] needs, bool narrow=False) -> Tensor[]",
    _backward,
    None,
    _backward_fake,
)


def lora_grouped_linear(
    operands: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    seeds: Tensor | None,
    spec: GroupedSpec,
) -> Tensor:
    """y, as reference.grouped_linear specifies it.

    operands: x, w, a, b and bias; routing: ends, groups and index.
    """
    y, _ = _LoraGroupedLinear.apply(*operands, *routing, seeds, spec)
    return y


class _LoraGroupedLinear(torch.autograd.Function):
    """Saves what the backward will read: of x and h no copy that the caller does not hold."""

    @staticmethod
    def forward(x, w, a, b, bias, ends, groups, index, seeds, spec):
        operands = x, w, a, b, bias, ends, groups, index, seeds
        return _forward_op(*operands, spec.scalings, spec.dropout_ps, spec.narrow)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, a, b, _, *routing, seeds, ctx.spec = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.needs = needs = Needs(*ctx.needs_input_grad[:5])
        ctx.sources = x.shape[0]
        ctx.save_for_backward(
            x if needs.w or needs.a else None,
            output[1] if needs.b else None,
            w,
            a,
            b,
            *routing,
            seeds,
        )

    @staticmethod
    def backward(ctx, dy, _):
        needs, spec = ctx.needs, ctx.spec
        if dy is None or not any(needs):
            return (None,) * 10  # one for each argument of forward
        eager = not torch.compiler.is_compiling()
        recorded = eager and torch.is_grad_enabled()
        if recorded or (eager and is_batched(dy)):
            if recorded and needs.b and needs.x and ctx.saved_tensors[0] is None:
                raise RuntimeError(
                    "lora_grouped_linear: double backward through x and lora_B needs lora_A to "
                    "require a gradient too; without it x is not saved"
                )
            x, h, w, a, b, ends, groups, index, seeds = ctx.saved_tensors
            grads = formula.lora_grouped_linear_backward(
                dy, x, h, w, a, b, ends, groups, index, seeds, ctx.sources, spec, needs
            )
        else:
            constants = spec.scalings, spec.dropout_ps, needs, spec.narrow
            grads = _backward_op(dy, *ctx.saved_tensors, ctx.sources, *constants)
        return (*needs.spread(grads), *(None,) * 5)
