"""numerics_of: the dtypes and precisions that products run in."""

import pytest
import torch
import triton.language as tl

from lora_kernels.kernels.numerics import Numerics, numerics_of

META, F32, F16, BF16 = torch.device("meta"), torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("x", "factor", "allow_tf32", "expected"),
    [
        (F32, F32, False, Numerics(tl.float32, tl.float32, tl.float32, tl.float32, "ieee", "ieee")),
        (F32, F32, True, Numerics(tl.float32, tl.float32, tl.float32, tl.float32, "tf32", "tf32")),
        (
            BF16, BF16, False,
            Numerics(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, "tf32", "tf32", 1),
        ),
        (
            F16, F16, False,
            Numerics(tl.float16, tl.float16, tl.float32, tl.float32, "tf32", "tf32", 1),
        ),
        (
            BF16, F32, True,
            Numerics(tl.bfloat16, tl.float32, tl.float32, tl.bfloat16, "tf32", "tf32", 2),
        ),
        (
            BF16, F32, False,
            Numerics(tl.bfloat16, tl.float32, tl.float32, tl.bfloat16, "tf32x3", "tf32", 3),
        ),
        (
            F16, F32, True,
            Numerics(tl.float16, tl.float32, tl.float32, tl.float32, "tf32", "tf32"),
        ),
    ],
    ids=str,
    indirect=["allow_tf32"],
)  # fmt: skip
def test_numerics_of_a_layer(hopper, x, factor, allow_tf32, expected):
    operands = [torch.empty(4, 4, dtype=dtype, device=META) for dtype in (x, factor, factor)]
    assert numerics_of(*operands) == expected
    assert numerics_of(operands[0], None, operands[1]) == expected


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_narrow_products_are_those_of_factors_in_the_layers_dtype(hopper, dtype):
    x, a, wide = (torch.empty(4, 4, dtype=d, device=META) for d in (dtype, dtype, F32))
    assert numerics_of(x, wide, wide, narrow=True) == numerics_of(x, a, a)


def test_numerics_of_amd_parts_multiply_float32_as_float32(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    x, a = torch.empty(4, 4, dtype=F16, device=META), torch.empty(4, 4, device=META)
    numerics = numerics_of(x, a)
    assert (numerics.precision, numerics.update_precision) == ("ieee", "ieee")
