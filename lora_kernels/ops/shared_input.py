"""The op behind lora_shared_linear: several LoRA linears over one x."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.table import GemmShape
from lora_kernels.ops.library import applier, compute, define, tma_if_asked
from lora_kernels.ops.linear import differentiable_backward
from lora_kernels.ops.obstacle import is_transformed
from lora_kernels.reference import formula
from lora_kernels.reference import shared_input as reference
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import LoraSpec, Needs, OutputSplits

__all__ = ["lora_shared_linear"]


def _forward(x, ws, a, bs, biases, seeds, *constants):
    specs = _specs(ws, *constants)
    shape = functools.partial(
        GemmShape,
        m=x.numel() // max(1, x.shape[-1]),
        n=sum(w.shape[0] for w in ws),
        k=x.shape[-1],
        r=a.shape[1],
        dtype=x.dtype,
        device=x.device,
        dropout=specs[0].dropout_p > 0,
        tma=tma_if_asked(x, *ws),
        uniform=specs[0].narrow or a.dtype == x.dtype,
    )
    arguments = (x, ws, a, bs, biases, seeds, specs)
    return compute(reference, "lora_shared_linear_forward", shape, arguments, (x, a, *bs))


def _backward(dys, x, h, ws, a, bs, seeds, *constants):
    specs, needs = _unpacked(ws, *constants)
    dy = dys[0]
    shape = functools.partial(
        GemmShape,
        m=dy.numel() // max(1, dy.shape[-1]),
        n=sum(w.shape[0] for w in ws),
        k=a.shape[2],
        r=a.shape[1],
        dtype=dy.dtype,
        device=dy.device,
        dropout=specs[0].dropout_p > 0,
        tma=tma_if_asked(*dys, *ws),
        backward=True,
        uniform=specs[0].narrow or a.dtype == dy.dtype,
    )
    arguments = (dys, x, h, ws, a, bs, seeds, specs, needs)
    return compute(reference, "lora_shared_linear_backward", shape, arguments, (dy, a, *bs))


def _forward_formula(x, ws, a, bs, biases, seeds, *constants):
    specs = _specs(ws, *constants)
    return reference.lora_shared_linear_forward(
        x, ws, a, bs, biases, seeds, specs, formula.lora_linear_forward
    )


def _backward_formula(dys, x, h, ws, a, bs, seeds, *constants):
    specs, needs = _unpacked(ws, *constants)
    return reference.lora_shared_linear_backward(
        dys, x, h, ws, a, bs, seeds, specs, needs, formula.lora_linear_backward
    )


def _specs(
    ws: Sequence[Tensor], scalings: Sequence[float], dropout_p: float, narrow: bool = False
) -> list[LoraSpec]:
    return [
        LoraSpec(scaling, dropout_p, OutputSplits.whole(w.shape[0]), narrow)
        for w, scaling in zip(ws, scalings, strict=True)
    ]


def _unpacked(ws, scalings, dropout_p, needs, narrow=False) -> tuple[list[LoraSpec], Needs]:
    return _specs(ws, scalings, dropout_p, narrow), Needs(*needs)


def _constants(specs: Sequence[LoraSpec]) -> tuple[list[float], float, bool]:
    """What the ops take for specs. Factors of all layers are in one product, so all are narrow."""
    narrow = any(spec.narrow for spec in specs)
    return [spec.scaling for spec in specs], specs[0].dropout_p, narrow


def _forward_fake(x, ws, a, *_):
    ys = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in ws]
    shape = (len(ws), x.numel() // x.shape[-1], a.shape[1])
    return [*ys, x.new_empty(shape, dtype=accumulate_dtype(x.dtype))]


def _backward_fake(dys, x, h, ws, a, bs, seeds, *constants):
    _, needs = _unpacked(ws, *constants)
    grads = []
    if needs.x:
        grads.append(dys[0].new_empty((*dys[0].shape[:-1], a.shape[2])))
    if needs.w:
        grads += [dy.new_empty((dy.shape[-1], a.shape[2])) for dy in dys]
    if needs.a:
        grads.append(a.new_empty(a.shape))
    if needs.b:
        grads += [b.new_empty(b.shape) for b in bs]
    if needs.bias:
        grads += [dy.new_empty((dy.shape[-1],)) for dy in dys]
    return grads


_forward_op = define(
    "lora_shared_linear_forward",
    "(Tensor x, Tensor[] ws, Tensor a, Tensor[] bs, Tensor?[] biases, Tensor? seeds, "
    "float[] scalings, float dropout_p, bool narrow=False) -> Tensor[]",
    _forward,
    _forward_formula,
    _forward_fake,
)
_backward_op = define(
    "lora_shared_linear_backward",
    "(Tensor[] dys, Tensor? x, Tensor? h, Tensor[] ws, Tensor a, Tensor[] bs, Tensor? seeds, "
    "float[] scalings, float dropout_p, bool[] needs, bool narrow=False) -> Tensor[]",
    _backward,
    _backward_formula,
    _backward_fake,
)


def lora_shared_linear(
    x: Tensor, seeds: Tensor | None, specs: Sequence[LoraSpec], *operands: Tensor | None
) -> list[Tensor]:
    """The y of L layers over x. operands: L of w, then L of a, L of b and L of bias."""
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *operands)
    )
    # TorchDynamo traces a Function with a variable number of arguments only with its backward. In
    # other code apply() costs as much as a small product, but it is what transforms know of.
    if not recorded and (torch.compiler.is_compiling() or not is_transformed()):
        *ys, _ = _compute(x, seeds, specs, *operands)
    else:
        *ys, _ = _apply(x, seeds, specs, *operands)
    return ys


def _compute(x, seeds, specs, *operands) -> tuple[Tensor, ...]:
    ws, factors, bs, biases = _quarters(operands)
    return tuple(_forward_op(x, ws, torch.stack(factors), bs, biases, seeds, *_constants(specs)))


class _LoraSharedLinear(torch.autograd.Function):
    """Saves the seeds and parameters, and of x and h what the backward will read."""

    @staticmethod
    def forward(x, seeds, specs, *operands):
        return _compute(x, seeds, specs, *operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seeds, ctx.specs, *operands = inputs
        ws, factors, bs, _ = _quarters(operands)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        # One answer for all layers over x: what one of them needs is computed for all.
        ctx.needs = needs = Needs(
            ctx.needs_input_grad[0], *map(any, _quarters(ctx.needs_input_grad[3:]))
        )
        ctx.save_for_backward(
            x if needs.w or needs.a else None,
            output[-1] if needs.b else None,
            seeds,
            *ws,
            *factors,
            *bs,
        )

    @staticmethod
    def backward(ctx, *dys):
        used = [dy is not None for dy in dys[:-1]]
        count = len(used)
        if not any(used):
            return (None,) * (3 + 4 * count)
        x, h, seeds, *operands = ctx.saved_tensors
        ws, factors, bs = operands[:count], operands[count : 2 * count], operands[2 * count :]
        like = next(dy for dy in dys if dy is not None)
        full = [
            like.new_zeros(*like.shape[:-1], w.shape[0]) if dy is None else dy
            for dy, w in zip(dys[:-1], ws, strict=True)
        ]
        specs, needs, a = ctx.specs, ctx.needs, torch.stack(factors)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = reference.lora_shared_linear_backward(
                full, x, h, ws, a, bs, seeds, specs, needs, differentiable_backward
            )
        else:
            scalings, dropout_p, narrow = _constants(specs)
            grads = _backward_op(full, x, h, ws, a, bs, seeds, scalings, dropout_p, needs, narrow)
        following = iter(grads)

        def of_layers(needed: bool) -> list[Tensor | None]:
            return [next(following) if needed else None for _ in range(count)]

        grad_x = next(following) if needs.x else None
        grad_ws = of_layers(needs.w)
        grad_as = next(following).unbind() if needs.a else [None] * count
        spread = (*grad_ws, *grad_as, *of_layers(needs.b), *of_layers(needs.bias))
        # An output that nothing used gives its layer no gradient, rather than zeros.
        asked = zip(ctx.needs_input_grad[3:], used * 4, strict=True)
        kept = (g if all(ask) else None for g, ask in zip(spread, asked, strict=True))
        return (grad_x, None, None, *kept)


_apply = applier(_LoraSharedLinear)


def _quarters(operands: Sequence) -> tuple[list, list, list, list]:
    """ws, factors, bs and biases, out of a list that holds them in this order."""
    count = len(operands) // 4
    ws, as_, bs, biases = (list(operands[i * count : (i + 1) * count]) for i in range(4))
    return ws, as_, bs, biases
