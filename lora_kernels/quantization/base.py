"""FrozenWeight: what layers and ops see of a base layer whose weight is not a dense matrix."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lora_kernels.foreign import ForeignModule

__all__ = ["DENSE", "TRAINED", "FourBit", "FrozenWeight", "NotFrozen"]

# Reasons that several libraries share.
DENSE = "its weight is dense: pass the weight itself"
TRAINED = "its weight requires grad: freeze it with weight.requires_grad_(False)"


class FourBit(NamedTuple):
    """A weight [N, K] of 4 bits, row by row: code[number] · absmax of its block.

    packed: uint8, ceil(N·K / 2) bytes, the first number of two in the upper half. Blocks of
    blocksize weights, a power of two from 2 on, run over the rows one after the other; the last may
    be shorter. absmax [ceil(N·K / blocksize)] float32. code [16] float32. shape: (N, K).
    nested: None; or (absmax2, code2, blocksize2, offset) of an absmax in uint8, which stands for
    code2[absmax] · absmax2 + offset, in blocks of blocksize2: code2 [256], offset one number.
    All is contiguous.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    nested: tuple[Tensor, Tensor, int, Tensor] | None


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The product x·wᵀ + bias of a layer, and its weight w [N, K] as a matrix made on demand.

    The forward of LoRA over such a layer is the layer's own; the backward multiplies by dense().
    A value is made anew for a call and costs no product: it reads the layer when it is asked.

    layer: the module; ``layer(x)`` is x·wᵀ + bias [..., N] by its own kernels. shape: (N, K).
    device: that of its parameters. dtype: in which ``layer(x)`` multiplies; None: in x's.
    kind: what the weight is, in a few words, such as "nf4". exact: whether x·dense()ᵀ + bias may
    stand in for ``layer(x)``: it may not if the layer rounds x to 8 bits. keeps_dtype: whether
    ``layer(x)`` is in x's dtype for every x, under autocast too.
    """

    keeps_dtype: ClassVar[bool] = False

    layer: ForeignModule
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype | None
    kind: str
    exact: bool

    def dense(self, dtype: torch.dtype) -> Tensor:
        """w [N, K] in dtype: a new tensor of no class of its own, which nobody else keeps."""
        raise NotImplementedError(f"{type(self).__name__} does not define dense")

    def four_bit(self) -> FourBit | None:
        """What the weight is made of if it has 4 bits, for a kernel that makes it dense."""
        return None

    def restore(self) -> None:
        """Undoes what a forward of the layer did to its weight in place.

        A layer that does that may lose its weight when it is saved or moved afterwards.
        """

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias [N]."""
        return self.layer.bias

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """In which dtype the layer multiplies this x, here and now."""
        return x.dtype if self.dtype is None else self.dtype


@dataclass(frozen=True)
class NotFrozen:
    """A layer is no frozen weight, for this reason, in words.

    error: what it is if a user asked for it: TypeError for a layer of no known kind, ValueError for
    one whose state does not fit.
    """

    reason: str
    error: type[Exception] = ValueError
