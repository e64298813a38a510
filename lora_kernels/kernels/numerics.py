"""How precise each product is: as precise as what it is rounded to."""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch.algorithm import tf32_allowed, triton_version
from lora_kernels.kernels.config import WAVE32, Tiles, select, target_of
from lora_kernels.kernels.hazards import MENDED


class Numerics(NamedTuple):
    """The dtype of both operands of each kind of dot, and how float32 ones are multiplied.

    main: whatever meets x, w or dy. update: h or dh times a factor, for y and dx. precision: how
    x and dy are multiplied with factors, h and dh. update_precision: how x·wᵀ, dy·w and update are.
    terms: how many numbers in main stand for one of a factor, if that is in another dtype, see
    split_terms.py; if it is more than 1, so many stand for one of h and dh in db and da, too. 0: a
    factor meets x as it is. What is in float32 in memory meets float16 scaled, see scaled.py.
    A constexpr argument of every kernel with a dot, which can read these fields and, with Triton
    3.9, no properties.
    """

    main: tl.dtype
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
        return torch.bfloat16 if self.terms == 1 and self.main is tl.bfloat16 else torch.float32

    @property
    def rank_terms(self) -> int:
        """How many terms h or dh is; 0 if it is one number."""
        return self.terms if self.terms > 1 else 0

    @property
    def scaled(self) -> bool:
        """Whether a product makes the terms, of float16, itself. Other terms are in memory."""
        return self.terms > 1 and self.main is tl.float16


_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def numerics_of(x: Tensor, *factors: Tensor | None, narrow: bool = False) -> Numerics:
    """The numerics of a layer whose x, or dy, and factors are these.

    float32 layers multiply as torch's float32 products do, with TF32 only if that is allowed; on
    Hopper with Triton before 3.7, x and dy meet factors as TF32x3 then, see hazards.py.
    16-bit layers multiply in their dtype. h and dh of a float16 layer are float32 in memory, and a
    power of two brings them into the range of float16 in a product, see scaled.py, so that no
    scaling overflows. gemm_small_m, and on Blackwell all that makes y and dx, multiplies them as
    TF32, which has as many bits of mantissa as float16. float32 factors over a 16-bit layer get
    float32 gradients, so the products that make these are as exact as float32 ones, or as TF32 if
    that is allowed; unless they are narrow, because autocast rounds the factors to x's dtype.
    """
    uniform = narrow or all(factor is None or factor.dtype == x.dtype for factor in factors)
    return _numerics(x.dtype, uniform, target_of(x.device), tf32_allowed())


def select_for(
    table: Tiles, device: torch.device, numerics: Numerics, m: int = 1, r: int = 1
) -> Any:
    """The entry of a table that serves what meets x or dy: m rows, if these decide, and rank r."""
    scaled, terms = numerics.scaled, numerics.terms > 1 and not numerics.scaled
    bits = bits_of(numerics.main)
    return select(table, target_of(device), bits, m, r, terms=terms, scaled=scaled)


def bits_of(dtype: tl.dtype) -> int:
    """How many bits an operand of a dot has, for the tables of tiles."""
    return 32 if dtype is tl.float32 else 16


@functools.cache
def _numerics(dtype: torch.dtype, uniform: bool, target: str, allowed: bool) -> Numerics:
    """uniform: the factors are in the layer's dtype. allowed: whether TF32 is."""
    # Not all of AMD's GPUs have TF32.
    tf32 = "ieee" if target in ("hip", WAVE32) else "tf32"
    # Triton's interpreter would multiply bfloat16 as integers.
    interpreted_bf16 = dtype == torch.bfloat16 and target == "interpreter"
    main = tl.float32 if interpreted_bf16 else _TL[dtype]
    if dtype == torch.float32:
        if not allowed:
            return Numerics(main, main, "ieee", "ieee")
        # For operands that are changed in registers: products of TF32x3 are waited for one by one.
        waits = target == "sm_90" and triton_version() < MENDED
        return Numerics(main, main, "tf32x3" if waits else tf32, tf32)
    if uniform:
        # Triton's interpreter would cut bits off, too, where it rounds to bfloat16.
        if interpreted_bf16:
            return Numerics(main, main, tf32, tf32)
        # On Blackwell a product's sum is not in registers, and to scale it there spills some.
        wide = dtype == torch.float16 and target == "sm_100"
        return Numerics(main, tl.float32 if wide else main, tf32, tf32, 1)
    if dtype == torch.float16:  # two terms have 22 bits
        return Numerics(main, tl.float32, tf32, tf32, 2)
    # Sixteen bits are more than TF32 has.
    return Numerics(main, main, tf32, tf32, 2 if allowed else 3)
