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

import threading

import torch
from torch import Tensor

__all__ = [
    "GROUP", "MULTIPLIERS", "ROUNDS", "WEYL", "keep_mask", "keep_scale", "philox_4x32", "threshold",
]  # fmt: skip

ROUNDS = 7
GROUP = 8  # elements of one row that share a call of the generator

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_4x32(counter, key, rounds: int = ROUNDS, workspace: Tensor | None = None):
    """Philox-4x32: four words of counter and two of key -> four random words.

    Shapes: counter 4 tensors and key 2 tensors, int64, broadcastable -> 4 tensors of their shape.
    Every word is an int64 whose lower half is the unsigned 32-bit value; words 1 and 3 carry other
    bits above it. workspace: int64 [6, *shape], whose memory the result then uses.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    if workspace is None:
        workspace = torch.empty((6, *shape), dtype=torch.int64, device=c0.device)
    word_0, word_2, *products = workspace  # two words and two pairs of products, over and over
    for i in range(rounds):
        out_0, out_1 = products[:2] if i % 2 else products[2:]
        # A product wraps past 2^63, but its 64 bits are those of the unsigned product. Only words
        # 0 and 2 are multiplied, so only they need their upper halves cleared.
        product_0 = torch.mul(c0, MULTIPLIERS[0], out=out_0 if c0.shape == shape else None)
        product_1 = torch.mul(c2, MULTIPLIERS[1], out=out_1 if c2.shape == shape else None)
        c0 = _mix(product_1, c1, k0 + i * WEYL[0], word_0)
        c2 = _mix(product_0, c3, k1 + i * WEYL[1], word_2)
        c1, c3 = product_1, product_0
    return c0, c1, c2, c3


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


def keep_mask(
    seed: Tensor,
    rows: int,
    cols: int,
    dropout_p: float,
    first_row: int = 0,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """keep(seed, row, col) for rows first_row .. first_row + rows - 1 and columns 0 .. cols - 1.

    Shapes: seed [1] int64 -> [rows, cols] on seed's device: 1 where kept, 0 where dropped.
    dtype: bool, float32 or float64.
    """
    seed = seed.reshape(())
    key = (seed & _LOW, (seed >> 32) & _LOW)
    groups = -(-cols // GROUP)
    mask = torch.empty((rows, groups * GROUP), dtype=dtype, device=seed.device)
    col_group = torch.arange(groups, device=seed.device)
    zero = torch.zeros_like(col_group)
    step = max(1, _CALLS_AT_ONCE // max(1, groups))
    for start in range(0, rows, step):
        part = mask[start : start + step]
        first = first_row + start
        row = torch.arange(first, first + len(part), device=seed.device).unsqueeze(1)
        workspace, draws = _memory(len(part), groups, seed.device)
        counter = (col_group, (row >> 32) & _LOW, row & _LOW, zero)
        for i, word in enumerate(philox_4x32(counter, key, workspace=workspace)):
            draws[..., i].copy_(word)  # the lower half of it
        halves = draws.view(torch.int16).flatten(1)
        if dtype == torch.bool:
            torch.ge(halves, threshold(dropout_p), out=part)
        else:  # float32 holds every draw, and is compared in place
            part.copy_(halves).ge_(threshold(dropout_p))
    return mask[:, :cols]


# How many calls of the generator are made in one go, at most: 4 MiB of memory serve any mask.
_CALLS_AT_ONCE = 1 << 16
_thread = threading.local()


def _memory(rows: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Workspace [6, rows, groups] int64 for philox_4x32, and [rows, groups, 4] int32 draws.

    On the CPU a thread keeps it: the page faults of fresh memory cost more than the arithmetic.
    Transforms of torch.func let a function write to its own memory only.
    """
    count = rows * groups
    transformed = torch._C._are_functorch_transforms_active()
    if device.type != "cpu" or count > _CALLS_AT_ONCE or transformed:
        memory = torch.empty(8 * count, dtype=torch.int64, device=device)
    else:
        memory = getattr(_thread, "memory", None)
        if memory is None:
            with torch.inference_mode(False):  # an inference tensor could not be reused outside
                memory = _thread.memory = torch.empty(
                    8 * _CALLS_AT_ONCE, dtype=torch.int64, device=device
                )
        memory = memory[: 8 * count]
    draws = memory[6 * count :].view(torch.int32).view(rows, groups, 4)
    return memory[: 6 * count].view(6, rows, groups), draws
