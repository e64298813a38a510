"""The dropout mask in Triton: the bits of dropout/mask.py, for any tile of x."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels import dropout

# An argument's default, because Triton compares a global of a kernel with itself in every launch.
_PHILOX = tl.constexpr((dropout.LANES, dropout.ROUNDS, *dropout.MULTIPLIERS, *dropout.WEYL))


class Mask(NamedTuple):
    """The mask as a kernel gets it; a kernel that drops nothing gets None in its place.

    seed: int64, one for each layer. threshold: word_threshold(p). It is a multiple of 65536 for
    every p, so another p needs no other compilation.
    """

    seed: Tensor
    threshold: int


def word_threshold(dropout_p: float) -> int:
    """threshold(p) for a draw that is in the upper half of a word."""
    return dropout.threshold(dropout_p) * 65536


@triton.jit
def keep_tile(
    seed, threshold, row, col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, PHILOX: tl.constexpr = _PHILOX,
    IN_DOT: tl.constexpr = False,
):  # fmt: skip
    """keep(seed, row.., col..) -> bool [BLOCK_ROWS, BLOCK_COLS].

    row: int64; the upper half of its bits must be the same for all rows of the tile, as it is if
    row is a multiple of BLOCK_ROWS. col: a multiple of 8. threshold: word_threshold(p). IN_DOT: the
    masked tile is an operand of a 16-bit dot.
    """
    LANES: tl.constexpr = PHILOX[0]
    ROUNDS: tl.constexpr = PHILOX[1]
    M0: tl.constexpr = PHILOX[2]
    M1: tl.constexpr = PHILOX[3]
    W0: tl.constexpr = PHILOX[4]
    W1: tl.constexpr = PHILOX[5]
    octets = col // LANES + tl.arange(0, BLOCK_COLS // LANES)[None, :]
    row = tl.cast(row, tl.int64)
    c0, c1 = octets.to(tl.uint32), (row >> 32).to(tl.uint32)
    c2 = row.to(tl.uint32) + tl.arange(0, BLOCK_ROWS).to(tl.uint32)[:, None]
    c3 = tl.zeros_like(octets).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    # After one round, words 0 and 1 depend on the rows alone, 2 and 3 on the columns alone: their
    # shapes are [ROWS, 1] and [1, COLS / 8]. The second round joins them.
    for _ in tl.static_range(ROUNDS):
        product_0, product_1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
        k0, k1 = k0 + W0, k1 + W1
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [ROWS, COLS / 8, 2, 2]: 0 1 2 3
    # A word is broadcast to its two elements. If other threads need it, because the layout is that
    # of a dot's result, the words are moved to them, and not a byte for every element.
    words = words.reshape(BLOCK_ROWS, BLOCK_COLS // 2, 1)
    if IN_DOT:
        # Triton takes a joined operand for one of 8 bits and moves its registers about for each
        # product. Behind a maximum, of one word, it does not see that the words were joined.
        words = tl.max(words, 2, keep_dims=True)
    to_upper_half = (16 - 16 * tl.arange(0, 2)).to(tl.uint32)[None, None, :]
    halves = (words << to_upper_half).to(tl.int32, bitcast=True)
    return (halves >= threshold).reshape(BLOCK_ROWS, BLOCK_COLS)
