"""lora_shared_linear and its backward in plain PyTorch: L linears over one x."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_kernels.reference.linear import lora_linear_backward, lora_linear_forward
from lora_kernels.spec import LoraSpec, Needs

__all__ = ["lora_shared_linear_backward", "lora_shared_linear_forward"]


def lora_shared_linear_forward(
    x: Tensor,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    specs: Sequence[LoraSpec],
    of_one: Callable = lora_linear_forward,
) -> list[Tensor]:
    """lora_linear_forward of L layers that share x, each with its own mask: every y, then h.

    Shapes: x [..., K], ws L of [N_l, K], a [L, r, K], bs L of [N_l, r], seeds [L]
    -> L of y [..., N_l], and h [L, M, r]. specs: L, with one dropout_p.
    of_one: what computes a layer.
    """
    results = [
        of_one(x, w, a[i], b, bias, _seed(seeds, i), spec)
        for i, (w, b, bias, spec) in enumerate(zip(ws, bs, biases, specs, strict=True))
    ]
    ys, hs = zip(*results, strict=True)
    return [*ys, torch.stack(hs)]


def lora_shared_linear_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    ws: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    seeds: Tensor | None,
    specs: Sequence[LoraSpec],
    needs: Needs,
    of_one: Callable = lora_linear_backward,
) -> list[Tensor]:
    """The gradients of lora_shared_linear_forward that needs asks for, of all layers.

    One dx, the sum over the layers; L of dw; da [L, r, K]; L of db; L of dbias; in that order.
    x may be None if neither dw nor da is needed, h if db is not needed. of_one: as in the forward.
    """
    of_layers = [
        needs.spread(
            of_one(dy, x, None if h is None else h[i], w, a[i], b, _seed(seeds, i), spec, needs)
        )
        for i, (dy, w, b, spec) in enumerate(zip(dys, ws, bs, specs, strict=True))
    ]
    dxs, dws, das, dbs, dbiases = (list(grads) for grads in zip(*of_layers, strict=True))
    grads: list[Tensor] = []
    if needs.x:
        add = Tensor.add_ if of_one is lora_linear_backward else torch.add
        grads.append(functools.reduce(add, dxs))
    if needs.w:
        grads += dws
    if needs.a:
        grads.append(torch.stack(das))
    if needs.b:
        grads += dbs
    if needs.bias:
        grads += dbiases
    return grads


def _seed(seeds: Tensor | None, layer: int) -> Tensor | None:
    return None if seeds is None else seeds[layer : layer + 1]
