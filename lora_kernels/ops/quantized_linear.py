"""The op behind lora_linear over a frozen weight that is not dense, and its autograd Function."""

import functools

import torch
from torch import Tensor

from lora_kernels.checks import autocast_dtype, is_autocast
from lora_kernels.dispatch.algorithm import GemmShape, choose
from lora_kernels.ops.dequantize import dense
from lora_kernels.ops.library import compute, define
from lora_kernels.ops.linear import (
    differentiable_backward,
    lora_linear_backward,
    lora_linear_forward,
)
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference import quantized_linear as reference
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.reference.products import product_dtype
from lora_kernels.spec import LoraSpec, Needs, OutputSplits

__all__ = ["LoraQuantizedLinear", "add_lora", "dense_dtype", "update_dtype"]


def _add_lora(y, x, a, b, seed, scaling, dropout_p, sizes, enabled, narrow=False):
    spec = LoraSpec(scaling, dropout_p, OutputSplits(tuple(sizes), tuple(enabled)), narrow)
    k, n = x.shape[-1], y.shape[-1]
    shape = functools.partial(
        GemmShape,
        m=x.numel() // max(1, k),
        n=n,
        k=k,
        r=b.shape[1],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout_p > 0,
    )
    return compute(reference, "add_lora", shape, (y, x, a, b, seed, spec), (x, y, a, b))


def _fake(y, x, a, *_):
    m = x.numel() // x.shape[-1]
    return x.new_empty((m, a.shape[0]), dtype=accumulate_dtype(x.dtype))


_op = define(
    "add_lora",
    "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? seed, float scaling, float dropout_p, "
    "SymInt[] out_splits, bool[] enable_lora, bool narrow=False) -> Tensor",
    _add_lora,
    None,
    _fake,
)


def add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, spec: LoraSpec
) -> Tensor:
    """h, and the update added to y in place, as reference.quantized_linear specifies, by the op."""
    splits = spec.splits
    constants = spec.scaling, spec.dropout_p, splits.sizes, splits.enabled
    return _op(y, x, a, b, seed, *constants, spec.narrow)


class LoraQuantizedLinear(torch.autograd.Function):
    """The base's own product and the update added to it; the backward multiplies by dense().

    The base runs without a graph, so it keeps nothing: neither its dense weight nor a copy of x.
    Saves what the backward will read of x, h, the seed and the factors.
    """

    @staticmethod
    def forward(ctx, x, a, b, bias, seed, frozen: FrozenWeight, spec: LoraSpec):
        """bias: frozen's own, which is an argument for its gradient alone."""
        ctx.frozen, ctx.spec = frozen, spec
        ctx.set_materialize_grads(False)
        needs_x, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:4]
        ctx.needs = needs = Needs(needs_x, False, needs_a, needs_b, needs_bias)
        dtype = update_dtype(x, frozen)
        # torch.compile takes no second name for an operand, as to() gives if nothing is to do.
        of_a = x if x.dtype == dtype else x.to(dtype)
        ctx.x_dtype, ctx.dense_dtype = of_a.dtype, frozen.product_dtype(x)
        rows = x.numel() // max(1, x.shape[-1])
        if (
            frozen.exact
            and dense_dtype(ctx.dense_dtype, x, rows) == torch.float32 != ctx.dense_dtype
            and (frozen.keeps_dtype or _is_in_dtype(x, ctx.dense_dtype))
        ):
            w, wide_bias = dense(frozen, torch.float32), None if bias is None else bias.float()
            y, h = lora_linear_forward(x, w, a, b, wide_bias, seed, spec)
            y = y.to(x.dtype)
        else:
            y = frozen.layer(x).contiguous()
            h = add_lora(y, of_a, a, b, seed, spec)
            # Of a view that a Function returns, autograd forbids a change in place.
            y = torch.ops.aten._unsafe_view.default(y, y.shape)
        if any(needs):
            ctx.dense_dtype = dense_dtype(ctx.dense_dtype, x, rows, backward=True)
        ctx.save_for_backward(
            of_a if needs.a else None,
            h if needs.b else None,
            a if needs.x or needs.a else None,
            b if needs.x or needs.a or needs.b else None,
            seed if needs.x or needs.a else None,
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs
        if dy is None or not any(needs):
            return (None,) * 7  # one for each argument of forward
        x, h, a, b, seed = ctx.saved_tensors
        dy = dy.to(ctx.x_dtype)
        w = dense(ctx.frozen, ctx.dense_dtype) if needs.x else None
        operands = (dy, x, h, w, a, b, seed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(*operands, ctx.spec, needs)
        else:
            grads = lora_linear_backward(operands, ctx.spec, needs)
        dx, _, da, db, dbias = needs.spread(grads)
        return dx, da, db, dbias, None, None, None


def update_dtype(x: Tensor, frozen: FrozenWeight) -> torch.dtype:
    """In which dtype lora_A multiplies x: in autocast's, if the base layer multiplies in that."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or dtype != frozen.product_dtype(x) else dtype


def _is_in_dtype(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is multiplied as it is by a weight in dtype."""
    return x.dtype == dtype and not is_autocast(x.device)


def dense_dtype(dtype: torch.dtype, x: Tensor, rows: int, backward: bool = False) -> torch.dtype:
    """In which dtype dense() is multiplied here over a base that multiplies in dtype."""
    wide = product_dtype(dtype, x.device, rows, backward)
    if (
        wide != dtype
        and choose(GemmShape(rows, 1, 1, 1, x.dtype, x.device, False)).name != "reference"
    ):
        return dtype  # kernels take operands of one dtype
    return wide
