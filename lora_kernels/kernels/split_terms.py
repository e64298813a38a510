"""terms[0] + terms[1] + … = factor: a wide factor as a sum of 16-bit ones.

A product of a 16-bit x with a float32 factor is the sum of its products with the terms, which are
exact, so x is multiplied as it is. Three terms in bfloat16 have all the bits of a float32. One
program owns BLOCK elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.config import target_of
from lora_kernels.kernels.launch import cdiv, launch, matrix
from lora_kernels.kernels.scaled import dot_scaled, dot_with_scaled
from lora_kernels.kernels.tile import load_tile, part_of

BLOCK = 512
SIDE_BY_SIDE = ("sm_90", "sm_100")  # targets whose dots read the right operand from shared memory
ALIGNED = 16  # elements that are loaded at once, and a stride that Triton knows to be a multiple


@triton.jit
def zeros_of_terms(
    TERMS: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BELOW: tl.constexpr = False,
):  # fmt: skip
    """The accumulators of the products with each term: a tuple, for dot_terms to add to.

    APART: one for each term [ROWS, COLS]; otherwise one for all, side by side, or below each other
    if BELOW, as the terms of a left operand are.
    """
    SLOTS: tl.constexpr = 1 if APART else TERMS + TERMS // 3  # a power of two
    HEIGHT: tl.constexpr = SLOTS * ROWS if BELOW else ROWS
    WIDTH: tl.constexpr = COLS if BELOW else SLOTS * COLS
    accs = (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    if APART:
        for _ in tl.static_range(TERMS - 1):
            accs += (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    return accs


@triton.jit
def _load_side_by_side(
    right, row, col, rows, cols, rows_of_term, ALONG_ROWS: tl.constexpr, TERMS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The tiles right[row.., col..] of all terms as one, and zero in a place without a term."""
    index_row = tl.arange(0, BLOCK_ROWS * (SLOTS if ALONG_ROWS else 1))
    index_col = tl.arange(0, BLOCK_COLS * (1 if ALONG_ROWS else SLOTS))
    offs_row, offs_col = row + index_row % BLOCK_ROWS, col + index_col % BLOCK_COLS
    of_row, of_col = (index_row // BLOCK_ROWS)[:, None], (index_col // BLOCK_COLS)[None, :]
    term = of_row + of_col  # one of the two is zero
    mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :] & (term < TERMS)
    offs = (tl.cast(term, tl.int64) * rows_of_term + offs_row[:, None]) * right.stride
    return tl.load(right.ptr + offs + offs_col[None, :], mask=mask, other=0.0)


@triton.jit
def load_terms(
    source, row, col, rows, cols, rows_of_term, ALONG_ROWS: tl.constexpr,
    TERMS: tl.constexpr, APART: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The tiles source[row.., col..] of all terms, as dot_terms takes them: zero beyond rows, cols.

    source: a matrix [.., cols] whose terms are rows_of_term rows below each other. ALONG_ROWS: the
    rows of source are ranks, of which each term has its own; otherwise its columns are.
    """
    tiles = ()
    if APART or TERMS == 1:
        for i in tl.static_range(TERMS):
            term = part_of(source, i * rows_of_term, 0)
            tile = load_tile(term, row, col, rows, cols, BLOCK_ROWS, BLOCK_COLS)
            if tl.float16 != DTYPE:  # dot_terms scales what float16 would not hold
                tile = tile.to(DTYPE)
            tiles += (tile,)
    else:
        tile = _load_side_by_side(
            source, row, col, rows, cols, rows_of_term,
            ALONG_ROWS, TERMS, TERMS + TERMS // 3, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        tiles = (tile.to(DTYPE),)
    return tiles


@triton.jit
def dot_terms(
    accs, left, tiles, TILES_T: tl.constexpr, NUMERICS: tl.constexpr
):  # fmt: skip
    """accs + left · the terms in tiles, or their transposes if TILES_T; in NUMERICS.main."""
    left, sums = left.to(NUMERICS.main), ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i].T if TILES_T else tiles[i]
        if left.dtype == tl.float16 and tile.dtype != tl.float16:
            sums += (accs[i] + dot_with_scaled(left, tile, NUMERICS.terms),)
        else:
            sums += (tl.dot(left, tile, accs[i], input_precision=NUMERICS.precision),)
    return sums


@triton.jit
def dot_of_terms(
    accs, tiles, right, NUMERICS: tl.constexpr, TILES_T: tl.constexpr = True
):  # fmt: skip
    """accs + the terms in tiles, or their transposes if TILES_T, · right; in NUMERICS.main."""
    right, sums = right.to(NUMERICS.main), ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i].T if TILES_T else tiles[i]
        if right.dtype == tl.float16 and tile.dtype != tl.float16:
            sums += (accs[i] + dot_scaled(tile, right, NUMERICS.terms),)
        else:
            sums += (tl.dot(tile, right, accs[i], input_precision=NUMERICS.precision),)
    return sums


@triton.jit
def _next_term(rest, DTYPE: tl.constexpr, FIRST: tl.constexpr):
    """(rest in DTYPE, what that lacks of rest).

    FIRST: of several terms in bfloat16. A finite rest has a finite term, and one that is infinite
    lacks nothing.
    """
    term = rest.to(DTYPE).to(tl.float32)
    if FIRST:
        # Rounded, what is above the largest bfloat16 is an infinity; cut off, it is not.
        cut = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        term = tl.where(tl.abs(term) == float("inf"), cut, term)
    lacking = rest - term
    if FIRST:
        lacking = tl.where(tl.abs(term) == float("inf"), 0.0, lacking)  # inf - inf is NaN
    return term.to(DTYPE), lacking


@triton.jit
def split_tile(tile, TERMS: tl.constexpr, DTYPE: tl.constexpr):
    """The terms of a tile in registers, for dot_terms: a tuple, each in DTYPE."""
    if TERMS == 1:
        terms = (tile.to(DTYPE),)
    else:
        rest, terms = tile.to(tl.float32), ()
        for i in tl.static_range(TERMS):
            term, rest = _next_term(rest, tl.bfloat16, i == 0)
            # A maximum, of one number, keeps Triton from splitting in the layout of a dot's
            # operand, of which several warps have the same elements.
            term = tl.max(term.to(tl.float32).reshape(term.shape[0], term.shape[1], 1), 2)
            terms += (term.to(DTYPE),)
    return terms


@triton.jit
def terms_of(
    source, row, col, rows, cols, TERMS: tl.constexpr, APART: tl.constexpr,
    NUMERICS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The terms of source[row.., col..], which is no terms in memory: a tuple, as accs above."""
    SLOTS: tl.constexpr = 1 if APART else TERMS + TERMS // 3
    rest = _load_side_by_side(
        source, row, col, rows, cols, 0, False, TERMS, SLOTS, BLOCK_ROWS, BLOCK_COLS
    ).to(tl.float32)
    term = (tl.arange(0, SLOTS * BLOCK_COLS) // BLOCK_COLS)[None, :]
    terms, tile = (), tl.zeros(rest.shape, tl.bfloat16)
    for i in tl.static_range(TERMS):
        rounded, rest = _next_term(rest, tl.bfloat16, i == 0)
        terms += (rounded.to(NUMERICS.main),)
        tile = tl.where(term == i, rounded, tile)
    if not APART:
        terms = (tile.to(NUMERICS.main),)
    return terms


@triton.jit
def sum_terms(accs, LENGTH: tl.constexpr, BELOW: tl.constexpr = False):
    """The sum of the products with each term [rows, LENGTH], or [LENGTH, cols] if BELOW."""
    SLOTS: tl.constexpr = accs[0].shape[0 if BELOW else 1] // LENGTH
    total = accs[0]
    if SLOTS > 1:
        if BELOW:
            total = tl.sum(total.reshape(SLOTS, LENGTH, total.shape[1]), 0)
        else:
            total = tl.sum(total.reshape(total.shape[0], SLOTS, LENGTH), 1)
    for i in tl.static_range(1, len(accs)):
        total += accs[i]
    return total


@triton.jit
def _split_terms_kernel(
    factor, terms, rows, cols, TERMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = offs // terms.stride, offs % terms.stride  # beyond cols it writes zero
    inside = row < rows
    at = factor.ptr + row * factor.stride + col
    rest = tl.load(at, mask=inside & (col < cols), other=0.0).to(tl.float32)
    for term in tl.static_range(TERMS):
        rounded, rest = _next_term(rest, terms.ptr.dtype.element_ty, TERMS > 1 and term == 0)
        at = terms.ptr + (tl.cast(term * rows, tl.int64) + row) * terms.stride + col
        tl.store(at, rounded, mask=inside)


def are_apart(device: torch.device, rows: int = 0) -> bool:
    """Whether each term has a dot of its own. A single one for all takes fewer instructions, if its
    right operand is read from shared memory; if from registers, more, for there is an empty place.

    rows: of the tile of a term, if terms are the left operand. Without padding a dot takes 64. A
    dot of 64 has its sums in Blackwell's tensor memory, and moving them takes more instructions.
    """
    target = target_of(device)
    return target not in SIDE_BY_SIDE or rows >= 64 or (rows > 0 and target == "sm_100")


def split_terms(factor: Tensor, dtype: torch.dtype, terms: int) -> tuple[Tensor, int]:
    """The terms of factor in dtype, one after the other, and their number.

    A factor that is in dtype has one term: itself; so has any if terms is 0, or if several would be
    float16, which products scale, see scaled.py. Shapes: factor [R, K]
    with a unit inner stride, or a stack of any strides -> [terms, *factor.shape], whose rows lie a
    multiple of ALIGNED elements apart.
    """
    if factor.dtype == dtype or terms == 0 or (dtype == torch.float16 and terms > 1):
        return factor, 1
    factor = factor if factor.dim() == 2 else factor.contiguous()
    *rows, cols = factor.shape
    stride = cdiv(cols, ALIGNED) * ALIGNED
    out = torch.empty((terms, *rows, stride), dtype=dtype, device=factor.device)[..., :cols]
    launch(
        _split_terms_kernel,
        (cdiv(factor.numel() // cols * stride, BLOCK),),
        factor=matrix(factor),
        terms=matrix(out),
        rows=factor.numel() // cols,
        cols=cols,
        TERMS=terms,
        BLOCK=BLOCK,
    )
    return out, terms
