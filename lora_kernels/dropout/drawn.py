"""The last masks that a thread has drawn, a bit for each element.

The backward needs the mask of the forward again. To find it here takes a tenth of the time that
drawing takes. A mask that is not here is drawn, so nothing but time depends on it.
"""

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["MOST_BYTES", "Drawn"]

# For all layers together: masks of 2^28 elements, as of 170 layers with 2048 rows of 768 columns.
MOST_BYTES = 1 << 25
_OF_AN_ENTRY = 1024  # bytes besides its bits, roughly
# The product of eight bytes 0 or 1 has byte i in bit i of its highest byte.
_GATHER = 0x0102040810204080
# Copies of a byte in eight bytes, of which byte i then holds bit i alone.
_COPIES, _OF_BYTE = 0x0101010101010101, 0x8040201008040201 - (1 << 64)


class Drawn:
    """The last masks, by what they follow from."""

    def __init__(self) -> None:
        self._bits: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0

    def keep(self, key: Hashable, flags: Tensor) -> None:
        """flags: bytes 0 and 1 [8·octets], contiguous, which are written to."""
        words = flags.view(torch.int64)
        bits = words.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
        self._bits[key] = bits
        self._bytes += len(bits) + _OF_AN_ENTRY
        while self._bytes > MOST_BYTES:
            _, oldest = self._bits.popitem(last=False)
            self._bytes -= len(oldest) + _OF_AN_ENTRY

    def find(self, key: Hashable, flags: Tensor) -> bool:
        """Fills flags, as keep() had them, if they were kept."""
        bits = self._bits.get(key)
        if bits is None:
            return False
        flags.view(torch.int64).copy_(bits).mul_(_COPIES).bitwise_and_(_OF_BYTE)
        flags.view(torch.uint8).ne_(0)
        return True
