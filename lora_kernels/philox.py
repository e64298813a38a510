"""The dropout mask: a pure function of (seed, row, column).

``keep(seed, row, col)`` is one 16-bit draw of Philox-4x32 with 7 rounds, compared with a threshold.
Nothing else enters: not the tile that asks, not the device, not the shape of the matrix around the
element. One call of the generator serves eight neighbours in a row:

=========  =====================================================================
counter    (col // 8, row >> 32, row & 0xffffffff, 0)
key        (seed & 0xffffffff, seed >> 32)
element    16-bit half ``col % 2`` (low half first) of output word ``col % 8 // 2``
kept       where that half, read as a signed 16-bit integer, is >= threshold(p)
=========  =====================================================================

With the column in word 0 of the counter and the row in words 1 and 2, the first round works on a
row vector and a column vector and the second joins them: two of the seven rounds cost next to
nothing, here and in a kernel.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2.
"""

import torch
from torch import Tensor

__all__ = ["GROUP", "ROUNDS", "keep_mask", "keep_scale", "philox_4x32", "threshold"]

ROUNDS = 7
GROUP = 8  # elements of one row that share a call of the generator

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_4x32(counter, key, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32: four words of counter and two of key -> four random words.

    Shapes: counter 4 tensors and key 2 tensors, int64, broadcastable -> 4 tensors of their shape.
    Every word is an int64 that holds an unsigned 32-bit value.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product wraps past 2^63, but its 64 bits are those of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product_1 >> 32) ^ c1 ^ k0) & _LOW
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & _LOW
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """Smallest signed 16-bit draw that is kept; p is rounded to a multiple of 2^-16, below 1."""
    return min(round(dropout_p * 65536), 65535) - 32768


def keep_scale(dropout_p: float) -> float:
    """1 / (1 - p) for the p that the mask really has."""
    return 65536 / (32768 - threshold(dropout_p))


def keep_mask(seed: Tensor, rows: int, cols: int, dropout_p: float, first_row: int = 0) -> Tensor:
    """keep(seed, row, col) for rows first_row .. first_row + rows - 1 and columns 0 .. cols - 1.

    Shapes: seed [1] int64 -> [rows, cols] bool on seed's device.
    """
    seed = seed.reshape(())
    row = torch.arange(first_row, first_row + rows, device=seed.device).unsqueeze(1)
    col_group = torch.arange(-(-cols // GROUP), device=seed.device).unsqueeze(0)
    counter = (col_group, (row >> 32) & _LOW, row & _LOW, torch.zeros_like(col_group))
    words = philox_4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    halves = torch.stack(words, dim=-1).to(torch.int32).view(torch.int16)  # [rows, groups, 8]
    return (halves >= threshold(dropout_p)).flatten(1)[:, :cols]
