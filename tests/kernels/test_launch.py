"""What launchers decide on the host: how work is cut, and how operands lie."""

import pytest
import torch
import triton.language as tl

from lora_kernels.kernels import launch


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("programs", [1, 5, 1000])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("wanted", [4, 8, 16])
def test_split_covers_the_length_in_whole_blocks(length, programs, block, wanted):
    count, size = launch.split(length, block, programs, wanted)
    assert size % block == 0
    assert count * size >= length > (count - 1) * size
    assert count == 1 or size >= 2 * block
    assert count == 1 or count * programs <= wanted


@pytest.mark.parametrize(
    ("r", "dtype", "expected"),
    [
        (1, tl.bfloat16, (16, 16)), (17, tl.bfloat16, (32, 32)), (64, tl.bfloat16, (64, 64)),
        (65, tl.bfloat16, (64, 32)), (300, tl.bfloat16, (64, 32)), (300, tl.float32, (32, 16)),
    ],
    ids=str,
)  # fmt: skip
def test_rank_block_pads_ranks_up_to_a_limit(r, dtype, expected):
    assert (launch.rank_block(r, dtype), launch.rank_block(r, dtype, beside_acc=True)) == expected


def test_matrix_of_a_stack_has_the_stride_of_its_rows():
    stack = torch.zeros(3, 4, 24)[:, :, :16]
    assert launch.matrix(stack) == (stack, 24)
    assert launch.matrix(None) is None


def test_mask_without_dropout_is_none():
    seed = torch.zeros(1, dtype=torch.int64)
    assert launch.mask(seed, 0.0) is None
    assert launch.mask(seed, 0.5) == (seed, 0)


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (lambda t: t, False),
        (lambda t: t[:, :5], False),
        (lambda t: t.view(2, 3, 8), False),
        (lambda t: t[:, ::2], True),
        (lambda t: t.T, True),
        (lambda t: t[:, :1], False),
    ],
)
def test_as_rows_copies_only_if_it_must(change, copied):
    tensor = change(torch.arange(48.0).view(6, 8))
    rows = launch.as_rows(tensor)
    assert torch.equal(rows, tensor.reshape(-1, tensor.shape[-1]))
    assert (rows.data_ptr() != tensor.data_ptr()) == copied


@pytest.mark.parametrize(
    ("change", "copied"),
    [(lambda t: t, False), (lambda t: t.T, False), (lambda t: t[::2, ::2], True)],
)
def test_with_unit_stride_takes_either_way_round(change, copied):
    tensor = change(torch.arange(48.0).view(6, 8))
    assert (launch.with_unit_stride(tensor).data_ptr() != tensor.data_ptr()) == copied
    assert torch.equal(launch.with_unit_stride(tensor), tensor)
