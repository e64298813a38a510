"""split_k_reduce: the sum of parts, in their order."""

import contextlib

import pytest
import torch

from lora_kernels.kernels.split_k_reduce import split_k_reduce, split_k_reduce_both
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import FEW, dtypes


@pytest.mark.parametrize("parts", [1, 2, 7, 9, 17])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 41)], ids=str)
@dtypes
def test_split_k_reduce_sums_and_rounds_once(dtype, shape, parts, seed, device):
    values = torch.randn(parts, *shape, device=device)
    if values[0].numel() <= FEW:
        values = values.abs()
    with guarded_outputs() if parts > 1 else contextlib.nullcontext():
        out = split_k_reduce(values, dtype)
    assert_close(out, values.double().sum(0), values.sum(0).to(dtype), "sum")


@pytest.mark.parametrize("parts", [(1, 3), (3, 1), (2, 2), (7, 2)], ids=str)
@pytest.mark.parametrize(
    "shapes", [((1, 1), (3, 5)), ((50, 41), (2, 3)), ((32, 32), (32, 64)), ((60, 50), (70, 41))],
    ids=str,
)  # fmt: skip
@dtypes
def test_split_k_reduce_both_is_two_sums(dtype, shapes, parts, seed, device):
    first, second = (
        torch.rand(count, *shape, device=device) for count, shape in zip(parts, shapes, strict=True)
    )
    with guarded_outputs():
        outs = split_k_reduce_both(first, torch.float32, second, dtype)
    for out, values, kind in zip(outs, (first, second), (torch.float32, dtype), strict=True):
        assert_close(out, values.double().sum(0), values.sum(0).to(kind), "sum")
        assert torch.equal(out, split_k_reduce(values, kind))
