"""Products of float32 tiles as float16 dots: a power of two times a tile meets a float16 one.

h and dh of a float16 layer have a range that float16 lacks, under a large scaling or a loss scale,
and so have float32 factors. A power of two for each row or column brings its largest element near
the end of that range. So no bit of a mantissa changes, and small rows beside large ones keep
theirs. The product is scaled back. One term has the bits of a float16, two have 22 of a float32's
24. What is 2²⁸ times smaller than another element of its row, with which it is added up, loses some
of those of one term, and at 2¹⁷ of those of two.
"""

import triton
import triton.language as tl


@triton.jit
def powers(largest):
    """(s, 1 / s): the powers of two that bring numbers up to largest into float16, and back.

    s · largest is less than 2¹⁵. s is at most 2⁶⁴: what is smaller still, no product with float16
    brings back into its range. An infinity or NaN counts as 2¹²⁸.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 77)
    up, down = (268 - exponent) << 23, (exponent - 14) << 23
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)


@triton.jit
def scaled(tile, AXIS: tl.constexpr, TERMS: tl.constexpr = 1):
    """(float16 terms whose sum is s · tile, 1 / s), one power of two s for all along AXIS.

    The terms are a tuple. Infinities and NaN stay what they are.
    """
    tile = tile.to(tl.float32)
    up, down = powers(tl.max(tl.abs(tile), AXIS, keep_dims=True))
    rest, terms = tile * up, ()
    for _ in tl.static_range(TERMS):
        term = rest.to(tl.float16)
        terms += (term,)
        lacking = rest - term.to(tl.float32)
        rest = tl.where(tl.abs(rest) == float("inf"), 0.0, lacking)  # inf - inf is NaN
    return terms, down


@triton.jit
def dot_scaled(left, right, TERMS: tl.constexpr = 1):
    """left · right in float32: left float32 with a power of two for each row, right float16."""
    lefts, down = scaled(left, 1, TERMS)
    product = tl.dot(lefts[0], right)
    for i in tl.static_range(1, TERMS):
        product += tl.dot(lefts[i], right)
    return product * down


@triton.jit
def dot_with_scaled(left, right, TERMS: tl.constexpr = 1):
    """left · right in float32: left float16, right float32 with a power of two for each column."""
    rights, down = scaled(right, 0, TERMS)
    product = tl.dot(left, rights[0])
    for i in tl.static_range(1, TERMS):
        product += tl.dot(left, rights[i])
    return product * down
