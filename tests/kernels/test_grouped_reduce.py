"""grouped_reduce: the parts of each group, in their order."""

import itertools

import pytest
import torch

from lora_kernels.kernels.grouped_reduce import grouped_reduce, members_of
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import dtypes


def test_members_of_are_in_order_and_others_are_no_groups(device):
    groups = torch.tensor([2, -1, 0, 2, 5, 0, 2], dtype=torch.int32, device=device)
    first, order = members_of(groups, 4)
    members = [order[start:stop].tolist() for start, stop in itertools.pairwise(first)]
    assert members == [[2, 5], [], [0, 3, 6], []]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (27, 41)], ids=str)
@dtypes
def test_grouped_reduce_sums_scales_and_rounds_once(dtype, shape, scaled, seed, device):
    groups = torch.tensor([2, -1, 0, 2, 5, 0, 2], device=device)
    parts = torch.rand(7, *shape, device=device)
    parts[(groups < 0) | (groups > 3)] = torch.nan
    scales = torch.tensor([1.5, 2.0, -3.0, 4.0], device=device) if scaled else None
    with guarded_outputs():
        out = grouped_reduce(parts, members_of(groups, 4), scales, dtype)
    factors = torch.ones(4, device=device) if scales is None else scales

    def sums(kind):
        rows = [parts[groups == g].to(kind).sum(0) * factors[g].to(kind) for g in range(4)]
        return torch.stack(rows)

    assert_close(out, sums(torch.float64), sums(torch.float32).to(dtype), "sum")


@dtypes
def test_rows_of_fewer_bits_are_summed_in_float32(dtype, seed, device):
    rows = torch.full((4097, 2), 1.0, device=device, dtype=dtype)
    index = torch.zeros(4097, dtype=torch.int64, device=device)
    index[-1] = 1
    out = grouped_reduce(rows, members_of(index, 3), None, dtype)
    assert out.tolist() == [[4096.0] * 2, [1.0] * 2, [0.0] * 2]
