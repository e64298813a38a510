"""What launchers share: matrices as arguments, how work is cut, and the launch itself."""

import contextlib
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.dispatch.fallback import of_kernels
from lora_kernels.kernels import records
from lora_kernels.kernels.config import GemmConfig, num_sms
from lora_kernels.kernels.dropout import Mask, word_threshold
from lora_kernels.kernels.tile import Matrix


def matrix(tensor: Tensor | None) -> Matrix | None:
    """What a kernel gets for [rows, cols], or a stack of such, whose rows have a unit stride."""
    return None if tensor is None else Matrix(tensor, tensor.stride(-2))


def mask(seed: Tensor | None, dropout_p: float) -> Mask | None:
    """What a kernel gets for the mask of a layer, or of layers that share x."""
    return Mask(seed, word_threshold(dropout_p)) if dropout_p > 0 else None


def tma_operand(tensor: Tensor, block_rows: int, block_cols: int, tma: bool):
    """What a kernel gets for a matrix: its descriptor for tiles of this shape, or a Matrix."""
    if not tma:
        return matrix(tensor)
    with of_kernels():
        return TensorDescriptor.from_tensor(tensor, [block_rows, block_cols])


def as_rows(tensor: Tensor | None) -> Tensor | None:
    """[..., C] as a matrix [M, C] whose rows have a unit stride; copies only if it must."""
    if tensor is None:
        return None
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def with_unit_stride(w: Tensor) -> Tensor:
    """w with a unit stride along one of its dimensions; copies only if it has neither."""
    return w if 1 in w.stride() else w.contiguous()


def cdiv(length: int, block: int) -> int:
    """length / block, rounded up. Called outside of kernels, triton.cdiv takes microseconds."""
    return -(-length // block)


def rank_block(r: int, dtype: tl.dtype, beside_acc: bool = False) -> int:
    """How many ranks a dot takes at once: r padded to a size that a dot takes, up to a limit.

    The limit keeps the operands in registers, even if float32 ones are split for TF32 products.
    beside_acc: whether the accumulator of a large product needs registers, too.
    """
    if dtype is tl.float32:
        limit = 16 if beside_acc else 32
    else:
        limit = 32 if beside_acc and r > 64 else 64
    return min(max(16, 1 << (r - 1).bit_length()), limit)


def split(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """(count, size): length cut into slices of whole blocks, for up to wanted programs in all.

    programs: how many there are without slicing. A slice has two blocks at least.
    """
    blocks = cdiv(length, block)
    most = max(1, wanted // programs)
    size = max(cdiv(blocks, most), min(2, blocks))
    return cdiv(blocks, size), size * block


def num_programs(tiles: int, config: GemmConfig, device: torch.device) -> int:
    """How many programs share the tiles: with TMA one for each multiprocessor, else one a tile.

    In the interpreter, which runs programs one after the other, the number changes no result.
    """
    return min(tiles, num_sms(device)) if config.tma else tiles


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes tensor's device the current one: Triton launches there, under its stream."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


_watched: list | None = None


@contextlib.contextmanager
def watched() -> Iterator[list]:
    """The list of all that Triton has compiled for the launches within."""
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Every launch of a kernel goes through here."""
    tape = records.current()
    with of_kernels():
        if tape is None:
            # kernel[grid](**arguments), in fewer calls
            compiled = kernel.run(grid=grid, warmup=False, **arguments)
            if _watched is not None:
                _watched.append(compiled)
        else:
            tape.launch(kernel, grid, arguments)
