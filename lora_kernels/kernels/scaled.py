"""Products of float32 tiles as float16 dots: a power of two times a tile meets a float16 one.

h and dh of a float16 layer have a range that float16 lacks, under a large scaling or a loss scale.
A power of two for each row or column brings its largest element near the end of that range. So no
bit of a mantissa changes, and small rows beside large ones keep theirs. What is 2²⁸ times smaller
than another element of its row, with which it is added up, loses bits. The product is scaled back.
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
def scaled(tile, AXIS: tl.constexpr):
    """(s · tile in float16, 1 / s) with one power of two s for all elements along AXIS.

    Infinities and NaN stay what they are.
    """
    up, down = powers(tl.max(tl.abs(tile), AXIS, keep_dims=True))
    return (tile * up).to(tl.float16), down


@triton.jit
def dot_scaled(left, right):
    """left · right in float32: left float32 with a power of two for each row, right float16."""
    left, down = scaled(left, 1)
    return tl.dot(left, right) * down
