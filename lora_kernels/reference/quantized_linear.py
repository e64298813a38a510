"""The update of lora_linear over a base that has computed its own product.

Notation: see linear.py. The backward is that of linear.py, with the base's dense() as w.
"""

from torch import Tensor

from lora_kernels.reference.linear import add_update_, low_rank_input
from lora_kernels.spec import LoraSpec

__all__ = ["add_lora"]


def add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, spec: LoraSpec
) -> Tensor:
    """y += scaling·h·bᵀ in place, in the columns of each enabled group; returns h = x_hat·aᵀ.

    Shapes: y [..., N] without gaps, x [..., K], a [E·r, K], b [rows of the enabled groups, r],
    seed [1] -> h [M, E·r] in accumulate_dtype. The dtype of y may be another than x's.
    """
    h = low_rank_input(x, a, seed, spec.dropout_p)
    add_update_(y.view(-1, y.shape[-1]), h, b, spec)
    return h
