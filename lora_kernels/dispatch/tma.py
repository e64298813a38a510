"""What TMA, the unit of Hopper and later that copies tiles, can read and write."""

from torch import Tensor

__all__ = ["is_tma_compliant", "rows_fit_tma", "why_not_tma"]

_ROW_BYTES = 16  # addresses and row strides must be multiples of this


def why_not_tma(matrix: Tensor) -> str | None:
    """Why a tensor descriptor cannot describe a matrix [..., K], in words; None if it can.

    The matrix may be stored by rows or by columns: one of its strides must be 1.
    """
    strides, sizes = matrix.stride(), matrix.shape
    if strides[-1] == 1:
        inner, others = sizes[-1], strides[:-1]
    elif 1 in strides:
        at = strides.index(1)
        inner, others = sizes[at], strides[:at] + strides[at + 1 :]
    else:
        return f"no stride is 1, got {strides}"
    if matrix.data_ptr() % _ROW_BYTES:
        return f"its address is not a multiple of {_ROW_BYTES}"
    size = matrix.element_size()
    for stride in others:
        if stride * size % _ROW_BYTES:
            return f"a stride of {stride} elements is not a multiple of {_ROW_BYTES} bytes"
        if stride < inner:
            return f"rows of {inner} elements overlap at a stride of {stride}"
    if max(sizes) >= 2**31:
        return f"a dimension of {max(sizes)} does not fit into 31 bits"
    return None


def is_tma_compliant(*matrices: Tensor | None) -> bool:
    """Whether tensor descriptors can describe all of these."""
    return all(matrix is None or why_not_tma(matrix) is None for matrix in matrices)


def rows_fit_tma(columns: int, like: Tensor) -> bool:
    """Whether a new matrix of so many columns, in like's dtype, is TMA compliant."""
    return columns * like.element_size() % _ROW_BYTES == 0
