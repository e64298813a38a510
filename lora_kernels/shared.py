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
    operands = (*weights, *lora_As, *lora_Bs, *biases)
    arguments = (xs[0], seeds, tuple(scalings), dropout_p, *operands)
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (xs[0], *operands)
    )
    if torch.compiler.is_compiling() and not recorded:
        # TorchDynamo cannot trace a Function with as many arguments as come without its backward.
        *ys, _ = _compute(*arguments)
    else:
        *ys, _ = _LoRASharedLinear.apply(*arguments)
    return tuple(ys)


def _compute(x, seeds, scalings, dropout_p, *flat) -> tuple[Tensor, ...]:
    ws, factors, bs, biases = _quarters(flat)
    return tuple(
        ops.lora_shared_linear_forward(
            x, ws, torch.stack(factors), bs, biases, seeds, scalings, dropout_p
        )
    )


class _LoRASharedLinear(torch.autograd.Function):
    """Saves x, h, the seeds and the parameters, and of these only what the backward will read."""

    @staticmethod
    def forward(x, seeds, scalings, dropout_p, *flat):
        return _compute(x, seeds, scalings, dropout_p, *flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seeds, *ctx.constants = inputs[:4]
        ws, factors, bs, _ = _quarters(inputs[4:])
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        # One answer for all layers of a group: what one of them needs is computed for all.
        of_ws, of_as, of_bs, of_biases = map(any, _quarters(ctx.needs_input_grad[4:]))
        ctx.needs = [ctx.needs_input_grad[0], of_ws, of_as, of_bs, of_biases]
        ctx.save_for_backward(
            x if of_ws or of_as else None, output[-1] if of_bs else None, seeds,
            *ws, *factors, *bs,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, *dys):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "lora_shared_linear: has no second derivative; call lora_linear for each layer "
                "where create_graph=True is needed"
            )
        used = [dy is not None for dy in dys[:-1]]
        if not any(used):
            return (None,) * (4 + 4 * len(used))
        x, h, seeds, *flat = ctx.saved_tensors
        count, (scalings, dropout_p) = len(used), ctx.constants
        ws, factors, bs = flat[:count], flat[count : 2 * count], flat[2 * count :]
        like = next(dy for dy in dys if dy is not None)
        full = [
            like.new_zeros(*like.shape[:-1], w.shape[0]) if dy is None else dy
            for dy, w in zip(dys[:-1], ws, strict=True)
        ]
        grads = iter(
            ops.lora_shared_linear_backward(
                full, x, h, ws, torch.stack(factors), bs, seeds, scalings, dropout_p, ctx.needs
            )
        )
        needs_x, needs_w, needs_a, needs_b, needs_bias = ctx.needs

        def of_layers(needed):
            return [next(grads) if needed else None for _ in range(count)]

        grad_x = next(grads) if needs_x else None
        grad_ws = of_layers(needs_w)
        grad_as = next(grads).unbind() if needs_a else [None] * count
        flat_grads = (*grad_ws, *grad_as, *of_layers(needs_b), *of_layers(needs_bias))
        # An output that nothing used gives its layer no gradient, rather than zeros.
        asked = zip(ctx.needs_input_grad[4:], used * 4, strict=True)
        kept = (g if all(ask) else None for g, ask in zip(flat_grads, asked, strict=True))
        return (grad_x, None, None, None, *kept)


def _quarters(flat: Sequence) -> tuple[list, list, list, list]:
    """weights, lora_As, lora_Bs and biases, as they stand one behind the other."""
    count = len(flat) // 4
    return tuple(list(flat[i * count : (i + 1) * count]) for i in range(4))
