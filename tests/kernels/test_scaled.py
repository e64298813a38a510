"""scaled: float32 tiles as powers of two times float16 ones, and the kernels that multiply these.

h and dh are as large, as small and as uneven as a loss scale makes them, and float32 factors as
they like. What they meet is sized so that the results fit into float16.
"""

from typing import NamedTuple

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

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = [(33, 24, 35, 5), (18, 24, 17, 70)]  # M, K, N, R


class Scaled(NamedTuple):
    """A launcher that multiplies one of its operands as float16.

    results: the index of each, the dimension of the operand that is a dimension of it, and which.
    """

    launcher: str
    operand: str
    meets: str  # one letter a name, but for dy
    results: tuple[tuple[int, str, int], ...]
    factors: torch.dtype = F16


ROWS, RANKS = ((0, "rows", 0),), ((0, "ranks", 0),)
CASES = {
    "expand_y": Scaled("expand_y", "h", "b", ROWS),
    "gemm_fwd": Scaled("gemm_fwd", "h", "b", ROWS),
    "grouped_expand_y": Scaled("grouped_expand_y", "h", "b", ROWS),
    "grad_b": Scaled("grad_b", "h", "dy", ((1, "ranks", 1),)),
    "expand_dx": Scaled("expand_dx", "dh", "a", ROWS),
    "gemm_bwd": Scaled("gemm_bwd", "dh", "a", ROWS),
    "grouped_gemm_dx": Scaled("grouped_gemm_dx", "dh", "a", ROWS),
    "grad_a": Scaled("grad_a", "dh", "x", RANKS),
    "expand_grad_a": Scaled("expand_grad_a", "dh", "ax", (*ROWS, (1, "ranks", 0))),
    # float32 factors, and h and dh beside them, in two terms.
    "shrink of a": Scaled("shrink", "a", "x", ((0, "rows", 1),), F32),
    "gemm_small_m of a": Scaled("gemm_small_m", "a", "x", ((1, "rows", 1),), F32),
    "grad_b of b": Scaled("grad_b", "b", "dy", ((0, "ranks", 1),), F32),
    "grad_b of h": Scaled("grad_b", "h", "dy", ((1, "ranks", 1),), F32),
    "grad_a of dh": Scaled("grad_a", "dh", "x", RANKS, F32),
    "expand_grad_a of dh": Scaled("expand_grad_a", "dh", "x", ((1, "ranks", 0),), F32),
    "weight_norm of b": Scaled("weight_norm", "b", "a", ROWS, F32),
}
launched = pytest.mark.parametrize("name", CASES)
every_result = pytest.mark.parametrize(
    ("name", "index", "of", "dim"), [(n, *result) for n in CASES for result in CASES[n].results]
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Case:
    """A launcher on operands whose large product is zero. partner: what scales the others."""

    def __init__(self, name, shape, device, partner=1.0, dropout_p=0.3, groups=None):
        self.case = CASES[name]
        self.entry = LAUNCHERS[self.case.launcher]
        m, k, n, r = shape
        few = {("expand_grad_a", F16): 64, ("expand_grad_a", F32): 32, ("gemm_small_m", F32): 32}
        shape = m, k, n, min(r, few.get((self.case.launcher, self.case.factors), r))
        self.o = operands(
            shape, F16, device, dropout_p=dropout_p, groups=groups, bias=False,
            lora_dtype=self.case.factors,
        )  # fmt: skip
        self.o.w.zero_()
        for other in ("dy",) if self.case.meets == "dy" else self.case.meets:
            getattr(self.o, other).mul_(partner)
        self.holder = self.o
        if self.case.launcher.startswith("grouped"):
            self.holder = self.o.grouped
            self.holder.y.zero_()
        # On a CPU tiles of which there are several; grad_b leaves db to grad_a if rows are few.
        rows = 32 if self.case.launcher == "grad_b" else 16
        small = SkinnyConfig(rows, 16, num_warps=4, num_stages=1)
        self.config = None if GPU or "gemm" in self.case.launcher else small

    @property
    def values(self) -> torch.Tensor:
        """The operand that is multiplied as float16."""
        return getattr(self.holder, self.case.operand)

    def run(self) -> tuple[torch.Tensor, ...]:
        return self.entry(self.o, self.config)

    def exact(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A result in float64, and in float32 rounded once."""
        rounded = self.entry.formula(self.o, F32)[index].to(self.run()[index].dtype)
        return self.entry.formula(self.o, F64)[index], rounded


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
    for index, *_ in CASES[name].results:
        assert_close(results[index], *case.exact(index), f"{name} {index}")
    assert all(map(torch.equal, results, case.run()))


@pytest.mark.parametrize("name", ["expand_y", "gemm_fwd", "grad_b"])
def test_products_of_merged_groups_beyond_float16(name, seed, device):
    case = Case(name, (33, 24, 0, 5), device, 2.0**-18, groups=GROUPS)
    case.values.mul_(2.0**26)
    results = case.run()
    for index, *_ in CASES[name].results:
        assert_close(results[index], *case.exact(index), f"{name} {index}")


@every_result
@shapes
def test_small_ones_beside_large_ones_keep_their_bits(name, index, of, dim, shape, seed, device):
    case = Case(name, shape, device, 2.0**10)
    make_uneven(case.values, of)
    result, exact = case.run()[index], case.exact(index)
    small = (slice(None, None, 2),) if dim == 0 else (slice(None), slice(None, None, 2))
    assert_close(result[small], *(t[small] for t in exact), name)
    assert not result.half().isfinite().all()  # the others are large, indeed


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


MIXED = {
    "shrink": [0], "gemm_small_m": [1], "grad_b": [0], "weight_norm": [0],
    "grouped_shrink_h": [0], "grouped_shrink_dh": [0],
}  # fmt: skip


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F32), (F32, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("launcher", MIXED)
def test_factors_in_other_dtypes(launcher, dtypes, seed, device):
    """Both are scaled, each from its own dtype. What is in float32 of the results is judged."""
    o = operands((12, 24, 35, 5), F16, device, dropout_p=0.3, lora_dtype=F32)
    o.a, o.b = o.a.to(dtypes[0]), o.b.to(dtypes[1])
    entry = LAUNCHERS[launcher]
    found, exact, rounded = entry(o), entry.formula(o, F64), entry.formula(o, F32)
    for i in MIXED[launcher]:
        assert_close(found[i], exact[i], rounded[i], launcher)


@triton.jit
def _scaled_kernel(
    tile_ptr, out_ptr, down_ptr,
    AXIS: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    offs = rows[:, None] * COLS + cols[None, :]
    terms, down = scaled(tl.load(tile_ptr + offs), AXIS, TERMS)
    for i in tl.static_range(TERMS):
        tl.store(out_ptr + i * ROWS * COLS + offs, terms[i])
    tl.store(down_ptr + (cols[None, :] if AXIS == 0 else rows[:, None]), down)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_tile_is_a_power_of_two_times_float16_terms(axis, terms, seed, device):
    """Of rows or columns of every size that float32 has."""
    count = 256
    exponents = torch.linspace(-140, 120, count, device=device).round()
    tile = torch.randn(count, 16, device=device) * torch.exp2(exponents)[:, None]
    tile = tile if axis == 1 else tile.T.contiguous()
    out = torch.empty(terms, *tile.shape, dtype=F16, device=device)
    down = torch.empty(count, device=device)
    _scaled_kernel[(1,)](tile, out, down, axis, terms, *tile.shape)
    assert torch.equal(down.log2(), down.log2().round())
    down, largest = down.double().unsqueeze(axis), out[0].abs().amax(axis)
    error = (out.double().sum(0) * down - tile.double()).abs()
    # As float16 rounds: half of the last bit of the last term, of a subnormal number too.
    own = 2.0 ** (-11 * terms) * tile.double().abs()
    assert (error <= torch.maximum(own, 2.0**-25 * down)).all()
    assert (largest[exponents >= -45] >= 2.0**14).all()
    assert (largest <= 2.0**15).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_an_infinity_has_one_term(value, device):
    tile = torch.ones(16, 16, device=device)
    tile[3, 5] = value
    out, down = torch.empty(2, 16, 16, dtype=F16, device=device), torch.empty(16, device=device)
    _scaled_kernel[(1,)](tile, out, down, 1, 2, 16, 16)
    assert (out[0, 3, 5], out[1, 3, 5]) == (value, 0)
    assert not out.isnan().any()
