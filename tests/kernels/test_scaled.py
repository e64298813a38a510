"""scaled: float32 tiles as powers of two times float16 ones, and the kernels that multiply these.

h and dh are as large, as small and as uneven as a loss scale makes them. What they meet is sized so
that the results fit into float16.
"""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.kernels.config import SkinnyConfig
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.kernels.scaled import scaled
from lora_kernels.testing.memory import guarded_outputs
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import GPU, GROUPS, operands

F16, F32, F64 = torch.float16, torch.float32, torch.float64
SHAPES = [(33, 24, 35, 5), (18, 24, 17, 70)]  # M, K, N, R
# Every launcher that multiplies h or dh as float16: which of both, and what it meets.
LAUNCHED = {
    "expand_y": ("h", "b"),
    "gemm_fwd": ("h", "b"),
    "grouped_expand_y": ("h", "b"),
    "grad_b": ("h", "dy"),
    "expand_dx": ("dh", "a"),
    "gemm_bwd": ("dh", "a"),
    "grouped_gemm_dx": ("dh", "a"),
    "grad_a": ("dh", "x"),
    "expand_grad_a": ("dh", "ax"),
}
# Their results: the index, the dimension of h or dh that is a dimension of the result, and which.
RESULTS = {
    **{name: [(0, "rows", 0)] for name in LAUNCHED},
    "grad_b": [(1, "ranks", 1)],
    "grad_a": [(0, "ranks", 0)],
    "expand_grad_a": [(0, "rows", 0), (1, "ranks", 0)],
}
launched = pytest.mark.parametrize("name", LAUNCHED)
every_result = pytest.mark.parametrize(
    ("name", "index", "of", "dim"), [(n, *result) for n in LAUNCHED for result in RESULTS[n]]
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Case:
    """A launcher on operands whose large product is zero. partner: what scales the others."""

    def __init__(self, name, shape, device, partner=1.0, dropout_p=0.3, groups=None):
        self.entry = LAUNCHERS[name]
        m, k, n, r = shape
        shape = m, k, n, min(r, 64) if name == "expand_grad_a" else r
        self.o = operands(shape, F16, device, dropout_p=dropout_p, groups=groups, bias=False)
        self.o.w.zero_()
        which, meets = LAUNCHED[name]
        for other in ("dy",) if meets == "dy" else meets:
            getattr(self.o, other).mul_(partner)
        self.holder, self.which = self.o, which
        if name.startswith("grouped"):
            self.holder = self.o.grouped
            self.holder.y.zero_()
        # On a CPU tiles of which there are several; grad_b leaves db to grad_a if rows are few.
        rows = 32 if name == "grad_b" else 16
        small = SkinnyConfig(rows, 16, num_warps=4, num_stages=1)
        self.config = None if GPU or "gemm" in name else small

    @property
    def values(self) -> torch.Tensor:
        """h or dh."""
        return getattr(self.holder, self.which)

    def run(self) -> tuple[torch.Tensor, ...]:
        return self.entry(self.o, self.config)

    def exact(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A result in float64, and in float32 rounded once."""
        return self.entry.formula(self.o, F64)[index], self.entry.formula(self.o, F32)[index].half()


def make_uneven(values: torch.Tensor, of: str) -> None:
    """Every second row, or column if of is ranks, small, and those between them large.

    The first rank is larger than the others.
    """
    small, large = (values, values[1::2]) if of == "rows" else (values.T, values.T[1::2])
    small.mul_(1e-6)
    large.mul_(1e10)
    values[:, 0].mul_(64)


@launched
@pytest.mark.parametrize(
    ("shape", "size"),
    [(SHAPES[0], "tiny"), (SHAPES[0], "end of float16"), (SHAPES[1], "beyond float16")],
    ids=str,
)
def test_products_of_any_size(name, shape, size, seed, device):
    scale = {"tiny": 1e-7, "end of float16": 65504.0, "beyond float16": 2.0**26}[size]
    partner = {"tiny": 2.0**12, "end of float16": 2.0**-8, "beyond float16": 2.0**-18}[size]
    case = Case(name, shape, device, partner)
    if size == "end of float16":
        case.values.copy_(case.values.sign() * (0.9 + 0.2 * torch.rand_like(case.values)))
    case.values.mul_(scale)
    with guarded_outputs():
        results = case.run()
    for index, *_ in RESULTS[name]:
        assert_close(results[index], *case.exact(index), f"{name} {index}")
    assert all(map(torch.equal, results, case.run()))


@pytest.mark.parametrize("name", ["expand_y", "gemm_fwd", "grad_b"])
def test_products_of_merged_groups_beyond_float16(name, seed, device):
    case = Case(name, (33, 24, 0, 5), device, 2.0**-18, groups=GROUPS)
    case.values.mul_(2.0**26)
    results = case.run()
    for index, *_ in RESULTS[name]:
        assert_close(results[index], *case.exact(index), f"{name} {index}")


@every_result
@shapes
def test_small_ones_beside_large_ones_keep_their_bits(name, index, of, dim, shape, seed, device):
    case = Case(name, shape, device, 2.0**10)
    make_uneven(case.values, of)
    result, exact = case.run()[index], case.exact(index)
    small = (slice(None, None, 2),) if dim == 0 else (slice(None), slice(None, None, 2))
    assert_close(result[small], *(t[small] for t in exact), name)
    assert not result.isfinite().all()  # the others are large, indeed


@every_result
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nan_arrive_and_change_nothing_else(
    name, index, of, dim, value, seed, device
):
    case = Case(name, SHAPES[0], device, dropout_p=0.0)
    expected = case.run()[index]
    case.values[3, 2] = value
    found = case.run()[index]
    at = 3 if of == "rows" else 2
    if dim == 1:
        found, expected = found.T, expected.T
    assert not found[at].isfinite().any()
    others = torch.arange(len(found), device=device) != at
    assert torch.equal(found[others], expected[others])


@every_result
@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_nothing_comes_of_zeros_and_of_what_is_smaller_than_float16(
    name, index, of, dim, value, seed, device
):
    case = Case(name, SHAPES[0], device)
    case.values.fill_(value)
    result = case.run()[index]
    assert torch.equal(result, torch.zeros_like(result))


@triton.jit
def _scaled_kernel(
    tile_ptr, out_ptr, down_ptr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    offs = rows[:, None] * COLS + cols[None, :]
    out, down = scaled(tl.load(tile_ptr + offs), AXIS)
    tl.store(out_ptr + offs, out)
    tl.store(down_ptr + (cols[None, :] if AXIS == 0 else rows[:, None]), down)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_tile_is_a_power_of_two_times_a_float16_one(axis, seed, device):
    """Of rows or columns of every size that float32 has."""
    count = 256
    exponents = torch.linspace(-140, 120, count, device=device).round()
    tile = torch.randn(count, 16, device=device) * torch.exp2(exponents)[:, None]
    tile = tile if axis == 1 else tile.T.contiguous()
    out = torch.empty_like(tile, dtype=F16)
    down = torch.empty(count, device=device)
    _scaled_kernel[(1,)](tile, out, down, axis, *tile.shape)
    assert torch.equal(down.log2(), down.log2().round())
    down, largest = down.double().unsqueeze(axis), out.abs().amax(axis)
    error = (out.double() * down - tile.double()).abs()
    # As float16 rounds: half of the last bit, of a subnormal number too.
    assert (error <= torch.maximum(2.0**-11 * tile.double().abs(), 2.0**-25 * down)).all()
    assert (largest[exponents >= -45] >= 2.0**14).all()
    assert (largest <= 2.0**15).all()
