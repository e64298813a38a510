"""numerics_of: the dtypes and precisions that products run in."""

import re
from pathlib import Path

import pytest
import torch
import triton.language as tl

from lora_kernels.kernels import numerics as module
from lora_kernels.kernels.numerics import Numerics, numerics_of

META, F32, F16, BF16 = torch.device("meta"), torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def triton_37(monkeypatch):
    """Products of TF32 as Triton 3.7 and newer compile them."""
    with_triton((3, 7, 0), monkeypatch)
    yield
    module._numerics.cache_clear()


def with_triton(version, monkeypatch):
    monkeypatch.setattr(module, "triton_version", lambda: version)
    module._numerics.cache_clear()


@pytest.mark.parametrize(
    ("x", "factor", "allow_tf32", "expected"),
    [
        (F32, F32, False, Numerics(tl.float32, tl.float32, "ieee", "ieee")),
        (F32, F32, True, Numerics(tl.float32, tl.float32, "tf32", "tf32")),
        (BF16, BF16, False, Numerics(tl.bfloat16, tl.bfloat16, "tf32", "tf32", 1)),
        (F16, F16, False, Numerics(tl.float16, tl.float16, "tf32", "tf32", 1)),
        (BF16, F32, True, Numerics(tl.bfloat16, tl.bfloat16, "tf32", "tf32", 2)),
        (BF16, F32, False, Numerics(tl.bfloat16, tl.bfloat16, "tf32", "tf32", 3)),
        (F16, F32, True, Numerics(tl.float16, tl.float32, "tf32", "tf32", 2)),
        (F16, F32, False, Numerics(tl.float16, tl.float32, "tf32", "tf32", 2)),
    ],
    ids=str,
    indirect=["allow_tf32"],
)  # fmt: skip
def test_numerics_of_a_layer(hopper, x, factor, allow_tf32, expected):
    operands = [torch.empty(4, 4, dtype=dtype, device=META) for dtype in (x, factor, factor)]
    assert numerics_of(*operands) == expected
    assert numerics_of(operands[0], None, operands[1]) == expected


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_no_product_of_a_16_bit_layer_is_float32(hopper, dtype):
    x, a = (torch.empty(4, 4, dtype=dtype, device=META) for _ in range(2))
    numerics, own = numerics_of(x, a), {F16: tl.float16, BF16: tl.bfloat16}[dtype]
    assert (numerics.main, numerics.update) == (own, own)
    assert numerics.dh == (F32 if dtype == F16 else BF16)


def test_blackwell_makes_y_and_dx_of_float16_as_tf32(hopper, monkeypatch):
    monkeypatch.setattr(module, "target_of", lambda device: "sm_100")
    x, a = (torch.empty(4, 4, dtype=F16, device=META) for _ in range(2))
    assert (numerics_of(x, a).main, numerics_of(x, a).update) == (tl.float16, tl.float32)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_narrow_products_are_those_of_factors_in_the_layers_dtype(hopper, dtype):
    x, a, wide = (torch.empty(4, 4, dtype=d, device=META) for d in (dtype, dtype, F32))
    assert numerics_of(x, wide, wide, narrow=True) == numerics_of(x, a, a)


@pytest.mark.parametrize("allow_tf32", [True], indirect=True)
def test_what_triton_before_3_7_would_overwrite_is_multiplied_as_tf32x3(
    hopper, allow_tf32, monkeypatch
):
    operands = [torch.empty(4, 4, device=META) for _ in range(2)]
    newer = numerics_of(*operands)
    assert newer.precision == "tf32"
    with_triton((3, 6, 0), monkeypatch)
    assert numerics_of(*operands) == newer._replace(precision="tf32x3")


def test_numerics_of_amd_parts_multiply_float32_as_float32(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    x, a = torch.empty(4, 4, dtype=F16, device=META), torch.empty(4, 4, device=META)
    numerics = numerics_of(x, a)
    assert (numerics.precision, numerics.update_precision) == ("ieee", "ieee")


def test_kernels_read_fields_alone():
    """Triton 3.9 makes a tuple of it that has no properties; 3.6 would not notice."""
    sources = [path.read_text("utf-8") for path in Path(module.__file__).parent.glob("*.py")]
    read = {name for source in sources for name in re.findall(r"\bNUMERICS\.(\w+)", source)}
    assert {"main", "update"} <= read <= set(Numerics._fields)
