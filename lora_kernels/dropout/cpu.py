"""The mask of mask.py in PyTorch's operators, fast on a CPU.

The first two rounds multiply only a vector with an entry for each octet of columns and one with an
entry for each row. The second round joins them to a matrix. So two of the seven rounds cost next to
nothing, here and in a kernel. A small mask takes as long as the calls that make it. So memory and
views are set up once for a shape, and a round is three or four calls.
"""

import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.dropout.drawn import Drawn
from lora_kernels.dropout.mask import LANES, MULTIPLIERS, ROUNDS, WEYL, threshold

__all__ = ["keep_mask", "masks"]

_LOW = 0xFFFFFFFF


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
    octets = -(-cols // LANES)
    mask = torch.empty((rows, octets * LANES), dtype=dtype, device=seed.device)
    for some in _slices(rows, octets, seed.device):
        _draw(mask[some], seed, first_row + some.start, threshold(dropout_p))
    return mask if cols == mask.shape[1] else mask[:, :cols]


def masks(
    seed: Tensor, rows: int, cols: int, dropout_p: float, dtype: torch.dtype, first_row: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """keep_mask, a slice of rows at a time: fresh memory for all of it costs more than the draws.

    The slices count from 0, the draws from first_row. The caller may write to a slice's mask. The
    next slice overwrites it.
    """
    octets = -(-cols // LANES)
    for some in _slices(rows, octets, seed.device):
        count = some.stop - some.start
        mask = _scratch(count * octets * LANES, dtype, seed.device).view(count, octets * LANES)
        _draw(mask, seed, first_row + some.start, threshold(dropout_p))
        yield some, mask if cols == mask.shape[1] else mask[:, :cols]


def _slices(rows: int, octets: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows, each of which is drawn at once; one empty slice if there are no rows."""
    at_once = max(1, _calls_at_once(device) // max(1, octets))
    for start in range(0, max(1, rows), at_once):
        yield slice(start, min(start + at_once, rows))


def _draw(mask: Tensor, seed: Tensor, first_row: int, smallest: int) -> None:
    """Fills a mask whose rows are whole octets."""
    rows, cols = mask.shape
    octets = cols // LANES
    if not _keeps(rows * octets, seed.device):
        draws = _Generator(rows, octets, _memory(rows * octets, seed.device)).draws(seed, first_row)
        if mask.dtype == torch.bool:
            torch.ge(draws, smallest, out=mask)
        else:  # a float holds every draw exactly: compared in place
            mask.copy_(draws).ge_(smallest)
        return
    kept, elements = _kept(), rows * cols
    flags, flat = kept.scratch(torch.uint8)[:elements], mask.view(-1)
    key = int(seed), first_row, rows, octets, smallest
    if kept.drawn.find(key, flags):
        flat.copy_(flags)
        return
    draws = kept.generator(rows, octets).draws(seed, first_row)
    # By way of floats: from int16 straight to bytes PyTorch is five times as slow.
    floats = flat if mask.dtype == torch.float32 else kept.scratch(torch.float32)[:elements]
    floats.copy_(draws.view(-1)).ge_(smallest)
    flags.view(torch.bool).copy_(floats)
    if floats is not flat:
        flat.copy_(flags)
    kept.drawn.keep(key, flags)


# products, the keys to xor them with, and what makes words: two halves, and where they are written
_Round = tuple[Tensor, Tensor | None, tuple[tuple[Tensor, Tensor, Tensor], ...]]


class _Generator:
    """Philox-4x32 for the counters of rows x octets, in memory that serves every seed.

    Of the four words of a call, a round multiplies words 0 and 2. ``state`` [2, rows, octets] holds
    them as int64 whose upper halves stay 0, so that their products are those of unsigned words.
    ``products[0]`` is that of word 2 and ``products[1]`` that of word 0. In this order the lower
    halves are the next words 1 and 3. The next words 0 and 2 are the xor of three things: the upper
    halves, words 1 and 3 (the lower halves of the round before) and the keys. The keys of a round
    are xored into the upper halves, and those of the following round into the lower halves. One
    call does both, so every other round needs no call for its keys.
    """

    def __init__(self, rows: int, octets: int, memory: Tensor):
        """memory: int64 [4, 2·calls at least]; memory[0] is 0 and no one else writes to it."""
        self._rows = rows
        self._first_row: int | None = None
        state, *products, draws = (
            part[: 2 * rows * octets].view(2, rows, octets) for part in memory
        )
        self._word_0, self._word_2 = state
        words = _lower(state)
        halves = draws.view(torch.int32).view(rows, octets, 2, 2)  # words 0 1, then 2 3
        self._draws = halves.view(torch.int16).view(rows, octets * LANES)
        drawn, self._words_1_and_3 = halves.permute(3, 2, 0, 1)

        # keys[i], for words 0 and 2: the lower half is round i + 1's key, the upper half round i's.
        int32 = functools.partial(torch.arange, dtype=torch.int32, device=memory.device)
        number = int32(ROUNDS - 1).view(-1, 1, 1) + int32(1, -1, -1)
        first, second = map(_signed, WEYL)
        weyl = int32(2).view(2, 1) * _signed(second - first) + first
        self._steps = number * weyl
        self._keys = torch.empty_like(self._steps)
        pairs = self._keys.view(torch.int64)
        self._key_0, self._key_2 = self._keys[0, :, 1]

        # The first round, except its keys, and the second: a vector of rows, then one of octets.
        col = torch.arange(octets, device=memory.device)
        product = col * MULTIPLIERS[0]
        self._upper_cols, self._lower_cols = _upper(product), _lower(product)
        self._upper_rows = torch.empty(rows, dtype=torch.int32, device=memory.device)
        self._lower_rows = torch.empty((rows, 1), dtype=torch.int32, device=memory.device)
        self._vectors = torch.zeros(rows + octets, dtype=torch.int64, device=memory.device)
        self._row_words, self._col_words = _lower(self._vectors).split((rows, octets))
        self._multipliers = torch.full_like(self._vectors, MULTIPLIERS[0])
        self._multipliers[rows:] = MULTIPLIERS[1]
        self._products = torch.empty_like(self._vectors)
        of_rows, of_cols = self._products.split((rows, octets))
        self._keyed = (of_cols, pairs[1, 0]), (of_rows, pairs[1, 1])
        self._joined = (
            (_upper(of_cols), self._lower_rows, words[0]),
            (_upper(of_rows).unsqueeze(1), self._lower_cols, words[1]),
        )

        # The other rounds: products, the keys to xor them with, and which halves make which words.
        uppers, lowers = [_upper(p) for p in products], [_lower(p) for p in products]
        self._rounds: list[_Round] = [
            (
                products[0],
                None,
                (
                    (uppers[0][0], _lower(of_cols), words[0]),
                    (uppers[0][1], _lower(of_rows).unsqueeze(1), words[1]),
                ),
            ),
        ]
        for i in range(3, ROUNDS):
            this = (i + ROUNDS - 1) % 2  # the last round gets none: its lower halves are draws
            keyed = pairs[i].unsqueeze(-1) if this else None
            out = drawn if i == ROUNDS - 1 else words
            self._rounds.append((products[this], keyed, ((uppers[this], lowers[1 - this], out),)))
        self._last = lowers[0]

    def draws(self, seed: Tensor, first_row: int) -> Tensor:
        """The draws of rows first_row, ...: int16 [rows, octets·8], until this is called again."""
        if first_row != self._first_row:
            self._set_rows(first_row)
        xor, multiply = torch.bitwise_xor, torch.mul
        torch.add(seed.reshape(1).view(torch.int32).view(2, 1), self._steps, out=self._keys)
        xor(self._upper_rows, self._key_0, out=self._row_words)
        xor(self._upper_cols, self._key_2, out=self._col_words)
        multiply(self._vectors, self._multipliers, out=self._products)
        for products, first_keys in self._keyed:
            products.bitwise_xor_(first_keys)
        for upper, lower, out in self._joined:
            xor(upper, lower, out=out)
        for products, keys, made in self._rounds:
            multiply(self._word_2, MULTIPLIERS[1], out=products[0])
            multiply(self._word_0, MULTIPLIERS[0], out=products[1])
            if keys is not None:
                products.bitwise_xor_(keys)
            for upper, lower, out in made:
                xor(upper, lower, out=out)
        self._words_1_and_3.copy_(self._last)
        return self._draws

    def _set_rows(self, first_row: int) -> None:
        self._first_row = None  # in case this is interrupted
        row = torch.arange(first_row, first_row + self._rows, device=self._vectors.device)
        product = (row & _LOW) * MULTIPLIERS[1]
        torch.bitwise_xor(_upper(product), _upper(row), out=self._upper_rows)
        self._lower_rows.copy_(_lower(product).unsqueeze(1))
        self._first_row = first_row


def _signed(word: int) -> int:
    """The int32 with the bits of a word of 32 bits."""
    return (word & _LOW ^ 1 << 31) - (1 << 31)


def _lower(words: Tensor) -> Tensor:
    """The lower halves of int64: a view, int32."""
    return words.view(torch.int32)[..., ::2]


def _upper(words: Tensor) -> Tensor:
    return words.view(torch.int32)[..., 1::2]


# The most calls of the generator that are made at once: 8 MiB of memory do for a mask of any size.
_CALLS_AT_ONCE = 1 << 17
# On a GPU a slice is 55 launches, whatever its size: 256 MiB do for 2^25 elements.
_CALLS_AT_ONCE_ELSEWHERE = 1 << 22
_GENERATORS = 64  # shapes that a thread remembers
_thread = threading.local()


def _calls_at_once(device: torch.device) -> int:
    return _CALLS_AT_ONCE if device.type == "cpu" else _CALLS_AT_ONCE_ELSEWHERE


def _keeps(calls: int, device: torch.device) -> bool:
    """Whether so many calls use memory that the thread keeps.

    On a CPU, memory for up to _CALLS_AT_ONCE calls is kept, because the page faults of fresh memory
    cost more than the arithmetic. Two things forbid it. Transforms of torch.func let a function
    write only to memory that it has made itself. Tensors made under a dispatch mode, such as
    FakeTensorMode, are of no use outside of it.
    """
    apart = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
    return device.type == "cpu" and calls <= _CALLS_AT_ONCE and not apart


def _kept() -> "_Kept":
    kept = getattr(_thread, "kept", None)
    if kept is None:
        kept = _thread.kept = _Kept()
    return kept


class _Kept:
    """What a thread keeps: generators of the last shapes over one memory, and a mask's memory."""

    def __init__(self) -> None:
        self.generator = functools.lru_cache(_GENERATORS)(self._generator)
        self.scratch = functools.cache(self._scratch)
        self.drawn = Drawn()
        self._memory: Tensor | None = None

    # Inference tensors could not be used again outside of inference_mode.
    @torch.inference_mode(False)
    def _generator(self, rows: int, octets: int) -> _Generator:
        if self._memory is None:
            self._memory = _memory(_CALLS_AT_ONCE, torch.device("cpu"))
        return _Generator(rows, octets, self._memory)

    @torch.inference_mode(False)
    def _scratch(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(LANES * _CALLS_AT_ONCE, dtype=dtype, device="cpu")


def _scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if _keeps(elements // LANES, device):
        return _kept().scratch(dtype)[:elements]
    return torch.empty(elements, dtype=dtype, device=device)


def _memory(calls: int, device: torch.device) -> Tensor:
    return torch.zeros((4, 2 * calls), dtype=torch.int64, device=device)
