"""Each kernel alone, launched directly: inputs between NaN, outputs guarded, all configurations."""

import contextlib
import itertools

import pytest
import torch

from lora_kernels.kernels import (
    da,
    down,
    dx,
    dy_pass,
    few_rows,
    fill,
    forward,
    launch,
    sum_parts,
)
from lora_kernels.testing.problem import make_problem
from tests.kernels import expected
from lora_kernels.testing.memory import between_nan, guarded_outputs
from lora_kernels.testing.tolerance import assert_close

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# M, K, N, R: ones, primes, just below and above a tile, whole tiles.
SHAPES = [(1, 1, 1, 1), (5, 7, 11, 3), (33, 65, 70, 17), (64, 64, 128, 16), (97, 96, 40, 70)]
FEW = 16  # results that are compared one by one, in effect
GROUPS = [(17, True), (5, False), (64, True), (10, False)]


def configurations(module, entries):
    """The configurations of a kernel's table that fit dots of these entries on this machine."""
    target = launch.target_of(torch.device("cuda" if GPU else "cpu"))
    table = module.CONFIGS[target]
    return [table[entry] for entry in entries if entry in table]


def skinny(module):
    """On a CPU: the table's tiles, and such small ones that the length is cut into slices."""
    if GPU:
        return configurations(module, ["narrow", "narrow_high_rank", "wide"])
    return [*configurations(module, ["narrow"]), launch.Skinny(16, 16, num_warps=4, num_stages=1)]


def gemms(module):
    """On a CPU: pointers, and descriptors with a tile finished in one, two and four pieces."""
    if GPU:
        entries = ["float32", "few_rows", "pointer", "pointer_high_rank", "tma", "tma_high_rank"]
        return configurations(module, entries)
    tma = [launch.Gemm(32, 64, 32, 4, 1, tma=True, pieces=pieces) for pieces in (1, 2, 4)]
    return [*configurations(module, ["float32"]), *tma[: 1 if module is forward else 3]]


def make_operands(shape, dtype, device, dropout_p=0.0, aligned=True, groups=None):
    """A problem's matrices between NaN."""
    m, k, n, r = shape
    n = sum(size for size, _ in groups) if groups else n
    problem = make_problem(
        m, k, n, r, device=device, dtype=dtype, dropout_p=dropout_p, groups=groups
    )  # fmt: skip
    few = m * min(k, n) <= FEW
    o = expected.Operands(problem.without_cancellation() if few else problem)
    if few:
        o.h, o.dh = o.h.abs(), o.dh.abs()
    for name in ("x", "w", "a", "b", "dy", "bias"):
        setattr(o, name, between_nan(getattr(o, name), aligned))
    return o


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", skinny(down), ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_down(aligned, config, dtype, shape, dropout_p, seed, device):
    o = make_operands(shape, dtype, device, dropout_p, aligned)
    with guarded_outputs():
        h = down.down(o.x, o.a, o.problem.seed, dropout_p, o.numerics, config)

    assert_close(h, expected.down(o, torch.float64), expected.down(o, torch.float32), "h")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", skinny(da), ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_da(aligned, config, dtype, shape, dropout_p, seed, device):
    o = make_operands(shape, dtype, device, dropout_p, aligned)
    with guarded_outputs():
        out = da.da(o.dh, o.x, o.problem.seed, dropout_p, o.a.dtype, o.numerics, config)

    assert_close(out, expected.da(o, torch.float64), expected.da(o, dtype), "da")


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", skinny(dy_pass), ids=str)
def test_dy_pass(config, dtype, shape, groups, needs, seed, device):
    o = make_operands(shape, dtype, device, groups=groups)
    if groups:  # nothing of a disabled group is read
        column = 0
        for size, on in groups:
            if not on:
                o.dy[:, column : column + size] = torch.nan
            column += size
    with guarded_outputs():
        dh, db = dy_pass.dy_pass(o.dy, o.b, o.h, 1.5, -0.5, *o.groups, *needs, o.numerics, config)
    assert (dh is not None, db is not None) == needs

    exact = expected.dy_pass(o, 1.5, -0.5, torch.float64, torch.float64)
    baseline = expected.dy_pass(o, 1.5, -0.5, o.numerics.dh, dtype)
    for result, *references, what in zip((dh, db), exact, baseline, ("dh", "db"), strict=True):
        if result is not None:
            assert_close(result, *references, what)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", skinny(fill), ids=str)
def test_fill_y(config, dtype, shape, groups, bias, seed, device):
    o = make_operands(shape, dtype, device, groups=groups)
    vector = o.bias if bias else None
    with guarded_outputs():
        y = fill.fill_y(o.h, o.b, vector, 1.5, *o.groups, dtype, o.numerics, config)

    exact, baseline = (expected.fill_y(o, vector, 1.5, t) for t in (torch.float64, dtype))
    assert_close(y, exact, baseline, "y")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", skinny(fill), ids=str)
def test_fill_dx(config, dtype, shape, dropout_p, seed, device):
    o = make_operands(shape, dtype, device, dropout_p)
    with guarded_outputs():
        out = fill.fill_dx(o.dh, o.a, o.problem.seed, dropout_p, dtype, o.numerics, config)

    assert_close(out, expected.fill_dx(o, torch.float64), expected.fill_dx(o, dtype), "dx")


def large_products(module):
    """Configuration, whether operands are aligned, whether w is stored [K, N]."""
    for config, aligned, transposed in itertools.product(
        gemms(module), [True, False], [False, True]
    ):
        if aligned or not config.tma:
            words = [*(["tma"] if config.tma else []), f"{config.BLOCK_M}x{config.BLOCK_N}"]
            words += [f"pieces{config.pieces}", "aligned" if aligned else "unaligned"]
            name = "-".join([*words, "KN" if transposed else "NK"])
            yield pytest.param(config, aligned, transposed, id=name)


def stored(o, aligned, transposed):
    """w [N, K], stored [K, N] if transposed."""
    return between_nan(o.w.T.contiguous(), aligned).T if transposed else o.w


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("config", "aligned", "transposed"), list(large_products(forward)))
def test_forward(config, aligned, transposed, dtype, shape, groups, seed, device):
    if groups and config.tma and transposed:  # a descriptor starts at multiples of 16 bytes
        groups = [(-(-size // 8) * 8, on) for size, on in groups]
    o = make_operands(shape, dtype, device, aligned=aligned, groups=groups)
    w, bias = stored(o, aligned, transposed), o.bias if aligned else None
    with guarded_outputs():
        y = forward.forward(o.x, w, o.h, o.b, bias, 1.5, *o.groups, o.numerics, config)

    exact, baseline = (expected.forward(o, bias, 1.5, t) for t in (torch.float64, dtype))
    assert_close(y, exact, baseline, "y")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("config", "aligned", "transposed"), list(large_products(dx)))
def test_dx(config, aligned, transposed, dtype, shape, dropout_p, seed, device):
    o = make_operands(shape, dtype, device, dropout_p, aligned)
    w = stored(o, aligned, transposed)
    with guarded_outputs():
        out = dx.dx(o.dy, w, o.dh, o.a, o.problem.seed, dropout_p, o.numerics, config)

    assert_close(out, expected.dx(o, torch.float64), expected.dx(o, dtype), "dx")


def few_rows_shapes():
    """Configuration and a shape with as many rows as one of its programs owns, or fewer."""
    entries = ["float32", "up_to_16", "up_to_64"]
    configs = (
        configurations(few_rows, entries) if GPU
        else [*configurations(few_rows, entries[:1]), launch.Gemm(16, 16, 16, 4, 1)]
    )  # fmt: skip
    shapes = [(1, 1, 1, 1), (5, 7, 11, 3), (16, 64, 128, 16), (37, 65, 70, 17), (64, 96, 40, 32)]
    for config, shape in itertools.product(configs, shapes):
        if shape[0] <= config.BLOCK_M:
            yield config, shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("aligned", "transposed"), [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "merged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("config", "shape"), list(few_rows_shapes()), ids=str)
def test_few_rows(config, shape, dtype, groups, aligned, transposed, dropout_p, seed, device):
    o = make_operands(shape, dtype, device, dropout_p, aligned, groups)
    w, bias = stored(o, aligned, transposed), o.bias if aligned else None
    with guarded_outputs():
        results = few_rows.few_rows(
            o.x, w, o.a, o.b, bias, o.problem.seed, 1.5, dropout_p, *o.groups, o.numerics, config
        )

    exact = expected.few_rows(o, bias, 1.5, torch.float64, torch.float64)
    baseline = expected.few_rows(o, bias, 1.5, dtype, torch.float32)
    for result, *references, what in zip(results, exact, baseline, ("y", "h"), strict=True):
        assert_close(result, *references, what)


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 41)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_parts(dtype, shape, parts, seed, device):
    values = torch.randn(parts, *shape, device=device)
    if values[0].numel() <= FEW:
        values = values.abs()
    with guarded_outputs() if parts > 1 else contextlib.nullcontext():
        out = sum_parts.sum_parts(values, dtype)
    assert_close(out, values.double().sum(0), values.sum(0).to(dtype), "sum")


@pytest.mark.parametrize("parts", [(1, 3), (3, 1), (2, 2), (7, 2)], ids=str)
@pytest.mark.parametrize(
    "shapes", [((1, 1), (3, 5)), ((50, 41), (2, 3)), ((32, 32), (32, 64)), ((60, 50), (70, 41))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_both(dtype, shapes, parts, seed, device):
    first, second = (
        torch.rand(count, *shape, device=device) for count, shape in zip(parts, shapes, strict=True)
    )
    with guarded_outputs():
        outs = sum_parts.sum_both(first, torch.float32, second, dtype)
    for out, values, kind in zip(outs, (first, second), (torch.float32, dtype), strict=True):
        assert_close(out, values.double().sum(0), values.sum(0).to(kind), "sum")
        assert torch.equal(out, sum_parts.sum_parts(values, kind))
