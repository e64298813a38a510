"""What the kernels' tests share: shapes, tiles, operands between NaN, and the comparison."""

import itertools

import pytest
import torch

from lora_kernels.kernels.config import GemmConfig, SkinnyConfig, target_of
from lora_kernels.kernels.operands import Operands
from lora_kernels.kernels.registry import KERNELS, LAUNCHERS
from lora_kernels.testing.memory import between_nan, guarded_outputs
from lora_kernels.testing.problem import make_problem
from lora_kernels.testing.tolerance import assert_close

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# M, K, N, R: ones, primes, just below and above a tile, whole tiles.
SHAPES = [(1, 1, 1, 1), (5, 7, 11, 3), (33, 65, 70, 17), (64, 64, 128, 16), (97, 96, 40, 70)]
FEW = 16  # results that are compared one by one, in effect
GROUPS = [(17, True), (5, False), (64, True), (10, False)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])
linear_and_merged = pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "merged"])
lying = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])


def tiles(kernel: str) -> list[SkinnyConfig | GemmConfig]:
    """All that the kernel's table has for this machine."""
    target = target_of(torch.device("cuda" if GPU else "cpu"))
    return list(dict.fromkeys(config for _, config in KERNELS[kernel].tiles[target]))


def skinny(kernel: str):
    """On a CPU besides the table's: tiles so small that the length is cut into slices."""
    small = [] if GPU else [SkinnyConfig(16, 16, num_warps=4, num_stages=1)]
    return pytest.mark.parametrize("config", [*tiles(kernel), *small], ids=str)


def gemms(kernel: str, subtiles: tuple[int, ...] = (1,)):
    """Configuration, whether operands are aligned, whether w is stored [K, N].

    On a CPU besides the table's: descriptors, with a tile finished in so many parts.
    """
    tma = [
        GemmConfig(32, 64, 32, num_warps=4, num_stages=1, tma=True, epilogue_subtile=parts)
        for parts in subtiles
    ]
    found = []
    for config, aligned, transposed in itertools.product(
        tiles(kernel) + tma * (not GPU), [True, False], [False, True]
    ):
        if aligned or not config.tma:
            words = [*(["tma"] if config.tma else []), f"{config.BLOCK_M}x{config.BLOCK_N}"]
            words += [f"subtile{config.epilogue_subtile}", "aligned" if aligned else "unaligned"]
            name = "-".join([*words, "KN" if transposed else "NK"])
            found.append(pytest.param(config, aligned, transposed, id=name))
    return pytest.mark.parametrize(("config", "aligned", "transposed"), found)


def operands(
    shape, dtype, device, *, dropout_p=0.0, aligned=True, groups=None, bias=True, transposed=False,
    lora_dtype=None,
) -> Operands:  # fmt: skip
    """A problem's matrices between NaN; transposed: w is stored [K, N]."""
    m, k, n, r = shape
    problem = make_problem(
        m, k, sum(size for size, _ in groups) if groups else n, r, device=device, dtype=dtype,
        dropout_p=dropout_p, groups=groups, bias=bias, scaling=1.5, lora_dtype=lora_dtype,
    )  # fmt: skip
    few = m * min(k, n) <= FEW
    o = Operands(problem.without_cancellation() if few else problem)
    if few:
        o.h, o.dh, o.kept = o.h.abs(), o.dh.abs(), o.kept.abs()
    for name in ("x", "a", "b", "dy", "kept", "col_scale") + ("bias",) * bias:
        setattr(o, name, between_nan(getattr(o, name), aligned))
    o.w = between_nan(o.w.T.contiguous(), aligned).T if transposed else between_nan(o.w, aligned)
    return o


def check(launcher: str, o: Operands, config, **results: torch.dtype) -> None:
    """The launcher computes its formula, in these dtypes, and writes its outputs and no more."""
    entry = LAUNCHERS[launcher]
    with guarded_outputs():
        outputs = entry(o, config)
    exact = entry.formula(o, torch.float64)
    for i, (name, dtype) in enumerate(results.items()):
        assert_close(outputs[i], exact[i], entry.formula(o, dtype)[i].to(dtype), name)
    assert len(outputs) == len(results)
