"""The op behind lora_linear and lora_merged_linear."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.table import GemmShape
from lora_kernels.ops.library import (
    applier,
    call_of,
    compute,
    define,
    is_direct,
    tma_if_asked,
    without_autocast,
)
from lora_kernels.ops.obstacle import is_batched
from lora_kernels.reference import formula
from lora_kernels.reference import linear as reference
from lora_kernels.spec import LoraSpec, Needs, OutputSplits

__all__ = [
    "LoraLinear", "apply_lora_linear", "backward_fake", "backward_shape",
    "differentiable_backward", "forward_shape", "lora_linear_backward", "lora_linear_forward",
    "repeat_lora_linear",
]  # fmt: skip


def forward_shape(
    x: Tensor, w: Tensor, b: Tensor, dropout_p: float, narrow: bool = False
) -> GemmShape:
    """What is asked for of a forward over x and w."""
    n, k = w.shape
    return GemmShape(
        m=x.numel() // max(1, k),
        n=n,
        k=k,
        r=b.shape[1],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout_p > 0,
        tma=tma_if_asked(x, w),
        uniform=narrow or b.dtype == x.dtype,
    )


def backward_shape(dy, x, w, a, b, dropout_p: float, narrow: bool = False) -> GemmShape:
    """What is asked for of a backward, of which operands may be None."""
    n = dy.shape[-1]
    wide = next((operand for operand in (x, w, a) if operand is not None), None)
    factor = a if b is None else b
    return GemmShape(
        m=dy.numel() // max(1, n),
        n=n,
        k=1 if wide is None else wide.shape[-1],
        r=1 if b is None else b.shape[1],
        dtype=dy.dtype,
        device=dy.device,
        dropout=dropout_p > 0,
        tma=tma_if_asked(dy, w),
        backward=True,
        uniform=narrow or factor is None or factor.dtype == dy.dtype,
    )


@without_autocast
def _compute_forward(x, w, a, b, bias, seed, spec: LoraSpec):
    operands = (x, w, a, b, bias, seed)
    shape = functools.partial(forward_shape, x, w, b, spec.dropout_p, spec.narrow)
    return compute(reference, "lora_linear_forward", shape, (*operands, spec), operands)


@without_autocast
def _compute_backward(dy, x, h, w, a, b, seed, spec: LoraSpec, needs: Needs):
    operands = (dy, x, h, w, a, b, seed)
    arguments = (*operands, spec, needs)
    shape = functools.partial(backward_shape, dy, x, w, a, b, spec.dropout_p, spec.narrow)
    return compute(reference, "lora_linear_backward", shape, arguments, operands)


def _forward(x, w, a, b, bias, seed, *constants):
    return _compute_forward(x, w, a, b, bias, seed, _spec(*constants))


def _backward(dy, x, h, w, a, b, seed, *constants):
    spec, needs = _unpacked(*constants)
    return _compute_backward(dy, x, h, w, a, b, seed, spec, needs)


def _forward_formula(x, w, a, b, bias, seed, *constants):
    return formula.lora_linear_forward(x, w, a, b, bias, seed, _spec(*constants))


def _backward_formula(dy, x, h, w, a, b, seed, *constants):
    spec, needs = _unpacked(*constants)
    return formula.lora_linear_backward(dy, x, h, w, a, b, seed, spec, needs)


def _spec(
    scaling: float,
    dropout_p: float,
    sizes: Sequence[int],
    enabled: Sequence[bool],
    narrow: bool = False,
) -> LoraSpec:
    return LoraSpec(scaling, dropout_p, OutputSplits(tuple(sizes), tuple(enabled)), narrow)


def _unpacked(scaling, dropout_p, sizes, enabled, needs, narrow=False) -> tuple[LoraSpec, Needs]:
    return _spec(scaling, dropout_p, sizes, enabled, narrow), Needs(*needs)


def _forward_fake(x, w, a, *_):
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    m = x.numel() // x.shape[-1]
    h = x.new_empty((m, a.shape[0]), dtype=reference.accumulate_dtype(x.dtype))
    return y, h


def backward_fake(dy, x, w, a, b, needs: Needs) -> list[Tensor]:
    """Tensors like the gradients that needs asks for."""
    grads = []
    if needs.x:
        grads.append(dy.new_empty((*dy.shape[:-1], w.shape[1])))
    if needs.w:
        grads.append(dy.new_empty((dy.shape[-1], x.shape[-1])))
    if needs.a:
        grads.append(a.new_empty(a.shape))
    if needs.b:
        grads.append(b.new_empty(b.shape))
    if needs.bias:
        grads.append(dy.new_empty((dy.shape[-1],)))
    return grads


def _backward_fake(dy, x, h, w, a, b, seed, *constants):
    return backward_fake(dy, x, w, a, b, _unpacked(*constants)[1])


_forward_op = define(
    "lora_linear_forward",
    "(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, SymInt[] out_splits, bool[] enable_lora, bool narrow=False) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_formula,
    _forward_fake,
)
_backward_op = define(
    "lora_linear_backward",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor? w, Tensor? a, Tensor? b, Tensor? seed, "
    "float scaling, float dropout_p, SymInt[] out_splits, bool[] enable_lora, bool[] needs, "
    "bool narrow=False) "
    "-> Tensor[]",
    _backward,
    _backward_formula,
    _backward_fake,
)


def lora_linear_forward(x, w, a, b, bias, seed, spec: LoraSpec) -> tuple[Tensor, Tensor]:
    """y and h, as reference.linear specifies them, by the op."""
    if not torch.is_grad_enabled() and is_direct(x, w, a, b, bias, seed):
        return _compute_forward(x, w, a, b, bias, seed, spec)
    operands, splits = (x, w, a, b, bias, seed), spec.splits
    constants = spec.scaling, spec.dropout_p, splits.sizes, splits.enabled
    return _forward_op(*operands, *constants, spec.narrow)


def lora_linear_backward(operands: Sequence[Tensor | None], spec: LoraSpec, needs: Needs):
    """The gradients that needs asks for, as reference.linear specifies them, by the op.

    operands: dy, x, h, w, a, b, seed.
    """
    if not torch.is_grad_enabled() and is_direct(*operands):
        return _compute_backward(*operands, spec, needs)
    splits = spec.splits
    constants = spec.scaling, spec.dropout_p, splits.sizes, splits.enabled
    return _backward_op(*operands, *constants, needs, spec.narrow)


class LoraLinear(torch.autograd.Function):
    """Saves what the backward will read of x, h, the seed and the parameters, and nothing else.

    call: the call as kernels/records.py knows it, if it has a record.
    """

    @staticmethod
    def forward(x, w, a, b, bias, seed, spec, call):
        if call is not None:
            result = call.run()
            if result is not NotImplemented:
                return result
        return lora_linear_forward(x, w, a, b, bias, seed, spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, a, b, _, seed, ctx.spec, _ = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.needs = needs = Needs(*ctx.needs_input_grad[:5])
        ctx.save_for_backward(
            x if needs.w or needs.a else None,
            h if needs.b else None,
            w if needs.x else None,
            a if needs.x or needs.a else None,
            b if needs.x or needs.a or needs.b else None,
            seed if needs.x or needs.a else None,
        )

    @staticmethod
    def backward(ctx, dy, _):
        needs = ctx.needs
        if dy is None or not any(needs):
            return (None,) * 8  # one for each argument of forward
        x, h, w, a, b, seed = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(dy, x, h, w, a, b, seed, ctx.spec, needs)
        else:
            grads = lora_linear_backward((dy, x, h, w, a, b, seed), ctx.spec, needs)
        return (*needs.spread(grads), None, None, None)


_apply = applier(LoraLinear)


def apply_lora_linear(x, w, a, b, bias, seed, spec: LoraSpec) -> Tensor:
    """y, with a gradient for each operand that wants one."""
    y, _ = _apply(x, w, a, b, bias, seed, spec, None)
    return y


def repeat_lora_linear(
    x, w, a, b, bias, spec: LoraSpec, like_seed: Tensor | None, draw: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """apply_lora_linear by the record of a call of this kind; None if there is no record.

    A record tells that operands of this kind have passed all checks. The operands are direct.
    like_seed: a seed of the kind that draw(like_seed) returns, which is called if there is one.
    """
    call = call_of("lora_linear_forward", (x, w, a, b, bias, like_seed, spec))
    if call is None or call.record is None:
        return None
    seed = None
    if like_seed is not None:
        seed = call.tensors[-1] = draw(like_seed)
    y, _ = _apply(x, w, a, b, bias, seed, spec, call)
    return y


def differentiable_backward(dy, x, h, w, a, b, seed, spec: LoraSpec, needs: Needs):
    """lora_linear_backward for create_graph=True: its gradients can be differentiated again."""
    if is_batched(dy):
        _check_second_derivative(x, needs)
        return _backward_of_all(dy, x, h, w, a, b, seed, spec, needs)
    return _LoraLinearBackward.apply(dy, x, h, w, a, b, seed, spec, needs)


class _LoraLinearBackward(torch.autograd.Function):
    """The backward as a function of its operands, for create_graph=True.

    Its own derivative is that of the formula, in plain PyTorch.
    """

    @staticmethod
    def forward(dy, x, h, w, a, b, seed, spec, needs):
        return tuple(lora_linear_backward((dy, x, h, w, a, b, seed), spec, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, ctx.spec, ctx.needs = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx, *grads):
        dy, x, h, w, a, b, seed = ctx.saved_tensors
        _check_second_derivative(x, ctx.needs)
        operands = {"dy": dy, "x": x, "w": w, "a": a, "b": b}
        present = [name for name, operand in operands.items() if operand is not None]

        def backward(*tensors):
            given = dict.fromkeys(operands) | dict(zip(present, tensors, strict=True))
            return tuple(_backward_of_all(**given, h=h, seed=seed, spec=ctx.spec, needs=ctx.needs))

        vjp = torch.func.vjp(backward, *(operands[name] for name in present))[1]
        by_name = dict(zip(present, vjp(grads), strict=True))
        ordered = [by_name.get(name) for name in ("dy", "x", None, "w", "a", "b")]
        return (*ordered, None, None, None)


def _backward_of_all(dy, x, h, w, a, b, seed, spec, needs) -> list[Tensor]:
    """The formula's backward, with h as a function of x and a.

    The saved h is a constant. It serves if neither x nor a needs a gradient: if one does, both are
    saved.
    """
    if needs.b and x is not None and a is not None:
        h = formula.low_rank_input(x, a, seed, spec.dropout_p)
    return formula.lora_linear_backward(dy, x, h, w, a, b, seed, spec, needs)


def _check_second_derivative(x: Tensor | None, needs: Needs) -> None:
    if needs.x and needs.b and x is None:
        raise RuntimeError(
            "lora_linear: double backward through x and lora_B needs lora_A to require a gradient "
            "too; without it x is not saved"
        )
