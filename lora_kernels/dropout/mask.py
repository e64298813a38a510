"""The definition of the dropout mask: it depends on the seed, the row, the column and p alone.

One call of Philox-4x32 with 7 rounds gives four words of 32 bits, which are eight draws of 16 bits,
for eight neighbours in a row of x [M, K]. An element is kept if its draw, read as a signed integer,
is not below a threshold. cpu.py computes the same bits fast, kernels/dropout.py in Triton.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2.
"""

import torch
from torch import Tensor

__all__ = ["LANES", "MULTIPLIERS", "ROUNDS", "WEYL", "keep", "keep_scale", "threshold"]

ROUNDS = 7
LANES = 8  # elements of one row that share a call
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Smallest signed 16-bit draw that is kept; p is rounded to a multiple of 2^-16, below 1."""
    return min(round(dropout_p * 65536), 65535) - 32768


def keep_scale(dropout_p: float) -> float:
    """1 / (1 - p) for p as threshold() rounds it."""
    return 65536 / (32768 - threshold(dropout_p))


def keep(seed: Tensor, row: Tensor, col: Tensor, dropout_p: float) -> Tensor:
    """Whether x[row, col] is kept: bool, of the shape that int64 row and col broadcast to.

    seed: int64 tensor of one element on their device.
    """
    row, col = torch.broadcast_tensors(row, col)
    counter = [col // LANES, row >> 32 & _WORD, row & _WORD, torch.zeros_like(row)]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(ROUNDS):
        # int64 products of unsigned words may wrap; the bits of both halves are right all the same.
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> 32 & _WORD) ^ counter[1] ^ key[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [(word + step) & _WORD for word, step in zip(key, WEYL, strict=True)]
    lane = col % LANES
    words = torch.stack(counter, -1).gather(-1, (lane // 2).unsqueeze(-1)).squeeze(-1)
    draw = words >> 16 * (lane % 2) & 0xFFFF  # the low half of a word comes first
    return (draw ^ 0x8000) - 0x8000 >= threshold(dropout_p)
