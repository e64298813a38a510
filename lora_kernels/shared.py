"""lora_shared_linear: several LoRA linears over one x, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import functional, ops

__all__ = ["lora_shared_linear"]


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

    What lora_linear gives for each layer, with one read of x for all low-rank products, and one dx
    to which the layers add in place. Each layer has a dropout mask of its own.

    Shapes: x [..., K]; for each of L layers weight [N_l, K], lora_A [R, K] with one R for all,
    lora_B [N_l, R], bias [N_l] -> L tensors [..., N_l].
    Dtypes, dropout_p, errors: as lora_linear. scalings: 1 each where None. seed: int64 tensor of L
    elements on x's device; None draws them.
    There is no second derivative: differentiating twice raises a RuntimeError.
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
                f"{name}: {argument} must have one entry for each of at least one weights, got "
                f"{len(values)} for {count}"
            )
    ranks = [a.shape[0] if isinstance(a, Tensor) and a.dim() else None for a in lora_As]
    if len(set(ranks)) > 1:
        raise ValueError(f"{name}: all lora_As must have the same number of rows, got {ranks}")
    prepared = [
        functional.prepared(name, x, *operands, dropout_p, None, (True,))
        for operands in zip(weights, lora_As, lora_Bs, biases, scalings, strict=True)
    ]
    xs, weights, biases, _ = zip(*prepared, strict=True)
    seeds = functional.seeds_for(name, xs[0], dropout_p, seed, count)
    flat = (*weights, *lora_Bs, *biases)
    *ys, _ = _LoRASharedLinear.apply(
        xs[0], torch.stack(tuple(lora_As)), seeds, tuple(scalings), dropout_p, *flat
    )
    return tuple(ys)


class _LoRASharedLinear(torch.autograd.Function):
    """Saves x, h, the seeds and the parameters, and of these only what the backward will read."""

    @staticmethod
    def forward(x, a, seeds, scalings, dropout_p, *flat):
        ws, bs, biases = _thirds(flat)
        return tuple(
            ops.lora_shared_linear_forward(x, ws, a, bs, biases, seeds, scalings, dropout_p)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, a, seeds, *ctx.constants = inputs[:5]
        ws, bs, _ = _thirds(inputs[5:])
        ctx.mark_non_differentiable(output[-1])
        # One answer for all layers of a group: what one of them needs is computed for all.
        needed = ctx.needs_input_grad
        of_ws, of_bs, of_biases = map(any, _thirds(needed[5:]))
        ctx.needs = [needed[0], of_ws, needed[1], of_bs, of_biases]
        ctx.save_for_backward(
            x if of_ws or needed[1] else None, output[-1] if of_bs else None, a, seeds, *ws, *bs
        )

    @staticmethod
    def backward(ctx, *dys):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "lora_shared_linear: has no second derivative; call lora_linear for each layer "
                "where create_graph=True is needed"
            )
        x, h, a, seeds, *flat = ctx.saved_tensors
        count, (scalings, dropout_p) = len(flat) // 2, ctx.constants
        ws, bs = flat[:count], flat[count:]
        grads = iter(
            ops.lora_shared_linear_backward(
                dys[:-1], x, h, ws, a, bs, seeds, scalings, dropout_p, ctx.needs
            )
        )
        needs_x, needs_w, needs_a, needs_b, needs_bias = ctx.needs

        def of_layers(needed):
            return [next(grads) if needed else None for _ in range(count)]

        grad_x = next(grads) if needs_x else None
        grad_ws = of_layers(needs_w)
        grad_a = next(grads) if needs_a else None
        grads_of_lists = (*grad_ws, *of_layers(needs_b), *of_layers(needs_bias))
        asked = ctx.needs_input_grad[5:]
        kept = (g if ask else None for g, ask in zip(grads_of_lists, asked, strict=True))
        return (grad_x, grad_a, None, None, None, *kept)


def _thirds(flat: Sequence) -> tuple[list, list, list]:
    """weights, lora_Bs and biases, as they stand one behind the other."""
    count = len(flat) // 3
    return list(flat[:count]), list(flat[count : 2 * count]), list(flat[2 * count :])
