"""What launchers share: the target, the configurations, the numerics and the launch itself."""

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.plan import FEW_ROWS, capability_of

__all__ = [
    "Gemm", "Numerics", "Skinny", "cdiv", "choose_gemm", "choose_skinny", "current",
    "fits_tma", "launch", "numerics_of", "operand", "programs", "programs_at_once", "rank_block",
    "slices", "target_of",
]  # fmt: skip


@dataclass(frozen=True)
class Skinny:
    """Tiles of a kernel that reads one large matrix once: BLOCK_ROWS x BLOCK_COLS of it.

    waves: into how many programs for each multiprocessor the work is cut, where it can be.
    """

    BLOCK_ROWS: int
    BLOCK_COLS: int
    num_warps: int
    num_stages: int
    waves: int = 2


@dataclass(frozen=True)
class Gemm:
    """Tiles of a large product.

    tma: operands come and go through tensor descriptors, and programs stay to take several tiles.
    pieces: how many pieces a tile is finished in where a dropout mask needs registers: 1, 2 or 4.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    tma: bool = False
    pieces: int = 1
    GROUP_M: int = 8


@dataclass(frozen=True)
class Numerics:
    """In which dtypes the operands of a dot meet, and how float32 ones are multiplied.

    main: x·wᵀ and dy·w. factor: x or dy with a factor, for h and dh. rank: h or dh with dy or x,
    for db and da; precision goes with these two. update: h or dh with a factor, for y and dx.
    """

    main: tl.dtype
    factor: tl.dtype
    rank: tl.dtype
    update: tl.dtype
    precision: str
    update_precision: str

    @property
    def dh(self) -> torch.dtype:
        """In which dtype dh lies in memory: float32, but for what every product rounds it to."""
        return torch.bfloat16 if self.rank is tl.bfloat16 else torch.float32


_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def numerics_of(x: Tensor, *factors: Tensor | None) -> Numerics:
    """How precise each product is: as precise as what it is rounded to.

    float32 layers multiply as torch's float32 products do, with TF32 only where that is allowed.
    16-bit layers multiply in their dtype; but h and dh of a float16 layer are float32 and meet
    others as TF32, which has float16's bits and a range that no scaling overflows. float32 factors
    over a 16-bit layer get float32 gradients, so what these are made of is multiplied as float32.
    """
    uniform = all(factor is None or factor.dtype == x.dtype for factor in factors)
    return _numerics(x.dtype, uniform, target_of(x.device), _tf32_allowed())


@functools.cache
def _numerics(dtype: torch.dtype, uniform: bool, target: str, tf32_allowed: bool) -> Numerics:
    """uniform: the factors are in the layer's dtype."""
    # TF32 is not everywhere on AMD's parts.
    tf32, exact = ("ieee", "ieee") if target == "hip" else ("tf32", "tf32x3")
    # Triton's interpreter would multiply bfloat16 as integers.
    interpreted_bf16 = dtype == torch.bfloat16 and target == "interpreter"
    main = tl.float32 if interpreted_bf16 else _TL[dtype]
    update = main if main is tl.bfloat16 else tl.float32
    if dtype == torch.float32:
        precision = tf32 if tf32_allowed else "ieee"
        return Numerics(main, main, main, main, precision, precision)
    if uniform:
        return Numerics(main, main, update, update, tf32, tf32)
    precision = tf32 if tf32_allowed else exact
    return Numerics(main, tl.float32, tl.float32, update, precision, tf32)


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # The older of the two settings cannot be read where the newer one was used.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


_TARGETS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def target_of(device: torch.device) -> str:
    """The key of a device in the tables of configurations."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    return _TARGETS.get(capability_of(device), "other")


@functools.cache
def programs_at_once(device: torch.device) -> int:
    """Multiprocessors of a device; a handful in the interpreter, which runs one after another."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(length: int, block: int) -> int:
    """length / block, rounded up. Called outside of kernels, triton.cdiv takes microseconds."""
    return -(-length // block)


def rank_block(r: int, dtype: tl.dtype, beside_acc: bool = False) -> int:
    """How many ranks a dot takes at once: r padded to what a dot takes, up to a limit.

    The limit keeps operands within registers, float32 ones split for TF32 products included.
    beside_acc: next to the accumulator of a large product.
    """
    if dtype is tl.float32:
        limit = 16 if beside_acc else 32
    else:
        limit = 32 if beside_acc and r > 64 else 64
    return min(max(16, 1 << (r - 1).bit_length()), limit)


def slices(
    length: int, block: int, programs: int, waves: int, device: torch.device
) -> tuple[int, int]:
    """(count, size): length cut into slices of whole blocks until the device has work.

    programs: how many there are without slicing. A slice has two blocks at least.
    """
    blocks = cdiv(length, block)
    wanted = max(1, waves * programs_at_once(device) // programs)
    size = max(cdiv(blocks, wanted), min(2, blocks))
    return cdiv(blocks, size), size * block


def choose_skinny(
    configs: dict[str, dict[str, Skinny]], device: torch.device, dtype: tl.dtype, r: int = 1
) -> Skinny:
    """The entry of a table for dots in this dtype: "wide" for float32, "narrow" for 16 bits.

    "narrow_high_rank" stands beside it where more than 16 ranks need smaller tiles.
    """
    table = configs[target_of(device)]
    if dtype is tl.float32:
        return table["wide"]
    return _by_rank(table, "narrow", r)


def choose_gemm(configs: dict[str, dict[str, Gemm]], m: int, r: int, x: Tensor, fits: bool) -> Gemm:
    """The entry of a table for products of x, m rows, and rank r.

    A target's entries: "float32"; for 16-bit operands "few_rows" (up to 64) and "pointer"; and
    "tma" where the target has descriptors and they fit the matrices. "pointer_high_rank" and
    "tma_high_rank" stand beside the two where more than 16 ranks need smaller tiles.
    """
    table = configs[target_of(x.device)]
    if x.dtype == torch.float32:
        return table["float32"]
    if m <= FEW_ROWS:
        return table["few_rows"]
    entry = "tma" if fits and "tma" in table else "pointer"
    return _by_rank(table, entry, r)


def _by_rank(table: dict, entry: str, r: int):
    return table.get(f"{entry}_high_rank", table[entry]) if r > 16 else table[entry]


def fits_tma(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can hold all of them: 16-byte rows that do not overlap."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and max(t.shape) < 2**31
        for t in matrices
    )


def operand(tensor: Tensor, block_rows: int, block_cols: int, tma: bool):
    """What a kernel gets for a matrix: its descriptor for tiles of this shape, or its pointer."""
    if tma:
        return TensorDescriptor.from_tensor(tensor, [block_rows, block_cols])
    return tensor


def programs(tiles: int, config: Gemm, device: torch.device) -> int:
    """How many programs share the tiles: as many as run at once, or one each.

    Where they run one after the other, as in the interpreter, that changes nothing.
    """
    return min(tiles, programs_at_once(device)) if config.tma else tiles


def current(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes tensor's device the current one: Triton launches there, under its stream."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Every launch of a kernel passes here."""
    kernel[grid](*args, **meta)
