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

The first two rounds multiply column vectors and row vectors only, and the second joins them: two of
the seven rounds cost next to nothing, here and in a kernel.

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
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    # Two words and two pairs of products, written over and over: fresh memory for every step costs
    # more in page faults than the arithmetic.
    word_0, word_2, *products = torch.empty((6, *shape), dtype=torch.int64, device=c0.device)
    for i in range(rounds):
        out_0, out_1 = products[:2] if i % 2 else products[2:]
        # A product wraps past 2^63, but its 64 bits are those of the unsigned product. Only words
        # 0 and 2 are multiplied, so only they need their upper halves cleared.
        product_0 = torch.mul(c0, _MULTIPLIERS[0], out=out_0 if c0.shape == shape else None)
        product_1 = torch.mul(c2, _MULTIPLIERS[1], out=out_1 if c2.shape == shape else None)
        c0 = _mix(product_1, c1, k0 + i * _WEYL[0], word_0)
        c2 = _mix(product_0, c3, k1 + i * _WEYL[1], word_2)
        c1, c3 = product_1, product_0
    return c0, c1 & _LOW, c2, c3 & _LOW


def _mix(product: Tensor, word: Tensor, key: Tensor, out: Tensor) -> Tensor:
    """(product >> 32) ^ word ^ key in 32 bits; in out's memory where the result has its shape."""
    if product.shape == out.shape:
        mixed = torch.bitwise_right_shift(product, 32, out=out).bitwise_xor_(word)
    else:
        mixed = (product >> 32) ^ word
    return mixed.bitwise_xor_(key).bitwise_and_(_LOW)


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
    w0, w1, w2, w3 = philox_4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    pairs = torch.stack((w0.add_(w1 << 32), w2.add_(w3 << 32)), dim=-1)  # [rows, groups, 2]
    halves = pairs.view(torch.int16)  # [rows, groups, 8], little-endian
    return (halves >= threshold(dropout_p)).flatten(1)[:, :cols]
