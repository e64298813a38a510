"""The mask in Triton: bit for bit that of dropout.py, wherever the tile lies."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels import dropout
from lora_kernels.kernels.dropout import keep_tile, word_threshold


@triton.jit(do_not_specialize=["col", "threshold"])
def _keep_kernel(
    seed_ptr, row_ptr, out_ptr, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    keep = keep_tile(tl.load(seed_ptr), threshold, tl.load(row_ptr), col, ROWS, COLS)
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offs, keep.to(tl.int8))


def tile(seed, row, col, rows, cols, dropout_p):
    out = torch.full((rows, cols), -1, dtype=torch.int8, device=seed.device)
    threshold = word_threshold(dropout_p)
    # An argument from 2^31 on would be 32 bits wide in the interpreter.
    rows_before = torch.tensor([row], device=seed.device)
    _keep_kernel[(1,)](seed, rows_before, out, col, threshold, ROWS=rows, COLS=cols)
    return out


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("cols", [8, 32, 128])
@pytest.mark.parametrize(
    ("row", "col"),
    [(0, 0), (48, 0), (7, 264), (2**31 + 5, 2**20), (3 * 2**31 + 5, 2**20)],
    ids=str,
)
def test_a_tile_has_the_bits_of_the_whole_mask(rows, cols, row, col, seed, device):
    seeds = torch.randint(-(2**63), 2**63 - 1, (1,)).to(device)
    wide = dropout.keep_mask(seeds, rows, col + cols, 0.3, first_row=row)
    assert torch.equal(tile(seeds, row, col, rows, cols, 0.3).bool(), wide[:, col:])


@pytest.mark.parametrize("value", [0, 1, -1, 2**32, -(2**63), 2**63 - 1], ids=str)
@pytest.mark.parametrize("row", [0, 2**32, 3 * 2**33 + 1], ids=str)
def test_seeds_and_rows_beyond_32_bits(value, row, device):
    seeds = torch.tensor([value], device=device)
    expected = dropout.keep_mask(seeds, 16, 64, 0.5, first_row=row)
    assert torch.equal(tile(seeds, row, 0, 16, 64, 0.5).bool(), expected)


@pytest.mark.parametrize("dropout_p", [2**-17, 2**-16, 0.1, 0.5, 0.9, 1 - 2**-16, 1 - 2**-40])
def test_thresholds(dropout_p, seed, device):
    seeds = torch.randint(-(2**63), 2**63 - 1, (1,)).to(device)
    expected = dropout.keep_mask(seeds, 64, 64, dropout_p)
    assert torch.equal(tile(seeds, 0, 0, 64, 64, dropout_p).bool(), expected)
