"""How operands have to lie in memory for the kernels; copies only where they do not."""

from torch import Tensor

__all__ = ["either_way", "rows"]


def rows(tensor: Tensor) -> Tensor:
    """[..., C] as a matrix [M, C] whose rows are whole in memory; copies only where it must."""
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def either_way(w: Tensor) -> Tensor:
    """w with a unit stride along N or along K; copies only where it has neither."""
    return w if 1 in w.stride() else w.contiguous()
