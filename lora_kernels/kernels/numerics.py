"""How precise each product is: as precise as what it is rounded to."""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch.algorithm import tf32_allowed, triton_version
from lora_kernels.kernels.config import WAVE32, target_of
from lora_kernels.kernels.hazards import MENDED


class Numerics(NamedTuple):
    """The dtype of both operands of each kind of dot, and how float32 ones are multiplied.

    main: x·wᵀ and dy·w. factor: x or dy times a factor, for h and dh. rank: h or dh times dy or x,
    for db and da. update: h or dh times a factor, for y and dx. rank and update in float16 are
    scaled, see scaled.py. precision: how factor and rank are multiplied. update_precision: how main
    and update are multiplied. terms: if it is not 0, then x and dy meet factors in main's dtype
    instead, and a factor in another dtype is so many terms, see split_terms.py; if it is more than
    1, h and dh in db and da are, too. A constexpr argument of every kernel with a dot, which can
    read these fields and, with Triton 3.9, no properties.
    """

    main: tl.dtype
    factor: tl.dtype
    rank: tl.dtype
    update: tl.dtype
    precision: str
    update_precision: str
    terms: int = 0

    def __hash__(self) -> int:
        # Triton hashes it in every launch, and a dtype's own hash is Python code.
        return hash((self.precision, self.update_precision))

    @property
    def dh(self) -> torch.dtype:
        """The dtype of dh in memory: bfloat16 if every product rounds dh to that, else float32."""
        return torch.bfloat16 if self.terms == 1 and self.rank is tl.bfloat16 else torch.float32

    @property
    def of_factor(self) -> tl.dtype:
        """The dtype in which x or dy meets the terms of a factor."""
        return self.main if self.terms else self.factor

    @property
    def rank_terms(self) -> int:
        """How many terms h or dh is; 0 if it is one number in dtype rank."""
        return self.terms if self.terms > 1 else 0


_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def numerics_of(x: Tensor, *factors: Tensor | None, narrow: bool = False) -> Numerics:
    """The numerics of a layer whose x, or dy, and factors are these.

    float32 layers multiply as torch's float32 products do, with TF32 only if that is allowed.
    16-bit layers multiply in their dtype. h and dh of a float16 layer are float32 in memory, and a
    power of two brings them into the range of float16 in a product, see scaled.py, so that no
    scaling overflows. gemm_small_m, and on Blackwell all that makes y and dx, multiplies them as
    TF32, which has as many bits of mantissa as float16. float32 factors over a 16-bit layer get
    float32 gradients, so the products that make these are float32; unless they are narrow, because
    autocast rounds the factors to x's dtype.
    On Hopper with Triton before 3.7, x and dy meet factors as TF32x3 if TF32 is allowed, see
    hazards.py.
    """
    uniform = narrow or all(factor is None or factor.dtype == x.dtype for factor in factors)
    return _numerics(x.dtype, uniform, target_of(x.device), tf32_allowed())


def bits_of(dtype: tl.dtype) -> int:
    """How many bits an operand of a dot has, for the tables of tiles."""
    return 32 if dtype is tl.float32 else 16


@functools.cache
def _numerics(dtype: torch.dtype, uniform: bool, target: str, allowed: bool) -> Numerics:
    """uniform: the factors are in the layer's dtype. allowed: whether TF32 is."""
    # Not all of AMD's GPUs have TF32.
    tf32, exact = ("ieee", "ieee") if target in ("hip", WAVE32) else ("tf32", "tf32x3")
    # For operands that are changed in registers: products of TF32x3 are waited for one by one.
    steady = exact if target == "sm_90" and triton_version() < MENDED else tf32
    # Triton's interpreter would multiply bfloat16 as integers.
    interpreted_bf16 = dtype == torch.bfloat16 and target == "interpreter"
    main = tl.float32 if interpreted_bf16 else _TL[dtype]
    if dtype == torch.float32:
        precisions = (steady, tf32) if allowed else ("ieee", "ieee")
        return Numerics(main, main, main, main, *precisions)
    if uniform:
        # Triton's interpreter would cut bits off, too, where it rounds to bfloat16.
        if interpreted_bf16:
            return Numerics(main, main, main, main, tf32, tf32)
        # On Blackwell a product's sum is not in registers, and to scale it there spills some.
        wide = dtype == torch.float16 and target == "sm_100"
        return Numerics(main, main, main, tl.float32 if wide else main, tf32, tf32, 1)
    precision = steady if allowed else exact
    if dtype == torch.float16:  # the terms of a large number would not fit
        return Numerics(main, tl.float32, tl.float32, tl.float32, precision, tf32)
    # Sixteen bits are more than TF32 has.
    return Numerics(main, tl.float32, main, main, precision, tf32, 2 if allowed else 3)
