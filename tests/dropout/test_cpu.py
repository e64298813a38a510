"""The mask in PyTorch: the bits of its definition in any part, memory, and statistics."""

import concurrent.futures
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import dropout
from lora_kernels.dropout import cpu
from tests.dropout.scalar import keep as scalar_keep

# The statistics are of a fixed function, so its seeds are fixed too: no run differs from another.
fixed_seeds = pytest.mark.parametrize("seed", [0, 20_261_124, 2**62 + 1])


def seed_tensor(value: int, device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


@pytest.fixture
def nothing_remembered():
    """This thread has made no mask yet, and leaves none behind."""
    vars(cpu._thread).clear()
    yield
    vars(cpu._thread).clear()


@pytest.mark.parametrize("value", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("first_row", [0, 2**31 - 2, 2**32 - 2, 2**40 + 5, 2**62])
def test_mask_is_the_documented_function_of_seed_row_and_column(value, first_row, device):
    rows, cols, p = 4, 19, 0.4
    mask = dropout.keep_mask(seed_tensor(value, device), rows, cols, p, first_row)
    expected = [
        [scalar_keep(value, first_row + row, col, p) for col in range(cols)] for row in range(rows)
    ]
    assert mask.tolist() == expected


def test_p_zero_keeps_everything(device):
    assert dropout.keep_mask(seed_tensor(3, device), 17, 23, 0.0).all()


@pytest.mark.parametrize(
    ("first_row", "shape"), [(0, (3, 1)), (5, (1, 8)), (2, (7, 13)), (0, (0, 4))]
)
def test_a_part_of_the_mask_is_the_same_bits(first_row, shape, device):
    rows, cols = shape
    whole = dropout.keep_mask(seed_tensor(99, device), 16, 32, 0.3)
    part = dropout.keep_mask(seed_tensor(99, device), rows, cols, 0.3, first_row)
    assert torch.equal(part, whole[first_row : first_row + rows, :cols])


SHAPES = [(3, 17), (16, 8), (17, 3), (1, 64), (40, 40)]


def test_masks_of_several_shapes_and_seeds_do_not_disturb_each_other(nothing_remembered, device):
    def masks():
        return [
            dropout.keep_mask(seed_tensor(seed, device), *shape, 0.4, first_row)
            for first_row in (0, 2**33)
            for seed in (1, -2)
            for shape in SHAPES
        ]

    alone = []
    for first_row in (0, 2**33):
        for seed in (1, -2):
            for shape in SHAPES:
                vars(cpu._thread).clear()
                alone.append(dropout.keep_mask(seed_tensor(seed, device), *shape, 0.4, first_row))
    for _ in range(2):
        for mask, expected in zip(masks(), alone, strict=True):
            assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_a_large_mask_is_made_in_several_goes(nothing_remembered, dtype, device, monkeypatch):
    expected = dropout.keep_mask(seed_tensor(7, device), 70, 90, 0.3)
    vars(cpu._thread).clear()
    monkeypatch.setattr(cpu, "_calls_at_once", lambda device: 64)  # 12 a row: 5 rows, 14 times
    mask = dropout.keep_mask(seed_tensor(7, device), 70, 90, 0.3, dtype=dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask.bool(), expected)
    wide = dropout.keep_mask(seed_tensor(7, device), 2, 8 * 65, 0.3)  # a row is more than one go
    assert torch.equal(wide[:, :90], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(70, 90), (1, 8), (5, 3), (0, 9)], ids=str)
def test_masks_are_keep_mask_in_slices_that_may_be_written_to(
    nothing_remembered, shape, dtype, device, monkeypatch
):
    whole = dropout.keep_mask(seed_tensor(7, device), *shape, 0.3, dtype=dtype)
    vars(cpu._thread).clear()
    monkeypatch.setattr(cpu, "_calls_at_once", lambda device: 64)
    for _ in range(2):
        ends = [0]
        for some, mask in dropout.masks(seed_tensor(7, device), *shape, 0.3, dtype):
            assert some.start == ends[-1]
            assert torch.equal(mask, whole[some])
            mask.fill_(torch.nan)
            ends.append(some.stop)
        assert ends[-1] == shape[0]
        assert len(ends) == {70: 15}.get(shape[0], 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_a_mask_that_was_drawn_is_found_again(nothing_remembered, dtype, device, monkeypatch):
    drawn = []
    draws = cpu._Generator.draws
    monkeypatch.setattr(
        cpu._Generator, "draws", lambda *args: drawn.append(args[1:]) or draws(*args)
    )

    def mask(value=7, shape=(70, 90), p=0.3, first_row=2, dtype=dtype):
        return dropout.keep_mask(seed_tensor(value, device), *shape, p, first_row, dtype)

    first = mask()
    expected = first.clone()
    first.zero_()  # the caller's
    assert torch.equal(mask(), expected)
    assert torch.equal(mask(dtype=torch.float64), expected.double())
    if device.type == "cpu":
        assert len(drawn) == 1
    others = [mask(value=8), mask(p=0.4), mask(first_row=3), mask(shape=(69, 90))]
    vars(cpu._thread).clear()
    alone = [mask(value=8), mask(p=0.4), mask(first_row=3), mask(shape=(69, 90))]
    assert all(map(torch.equal, others, alone))
    assert not any(torch.equal(other, expected) for other in others)


def test_threads_make_masks_at_the_same_time(nothing_remembered, device):
    seeds = [seed_tensor(i, device) for i in range(4)]
    expected = [dropout.keep_mask(seed, 64, 1024, 0.5) for seed in seeds]

    def right(i: int) -> bool:
        return all(
            torch.equal(dropout.keep_mask(seeds[i], 64, 1024, 0.5), expected[i]) for _ in range(50)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(right, range(4))) == [True] * 4


def test_what_inference_mode_remembers_serves_outside_of_it(nothing_remembered, device):
    with torch.inference_mode():
        inside = dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5)
    outside = dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5, first_row=0)
    later = dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5, first_row=4)
    assert torch.equal(inside, outside)
    assert torch.equal(later[:5], outside[4:])


def test_fake_tensors_are_not_remembered(nothing_remembered, device):
    with FakeTensorMode():
        assert dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5).shape == (9, 20)
    mask = dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5)
    with FakeTensorMode():
        assert dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5).shape == (9, 20)
    assert torch.equal(dropout.keep_mask(seed_tensor(5, device), 9, 20, 0.5), mask)


def test_rows_beyond_32_bits_do_not_repeat(device):
    seed = seed_tensor(5, device)
    low = dropout.keep_mask(seed, 8, 64, 0.5)
    for first_row in (2**31, 2**32, 2**33, 2**48):
        assert not torch.equal(dropout.keep_mask(seed, 8, 64, 0.5, first_row), low)


@fixed_seeds
@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_drop_rate_is_p_within_four_sigma(p, seed, device):
    mask = dropout.keep_mask(seed_tensor(seed, device), 512, 1024, p)
    expected = 1 / dropout.keep_scale(p)
    sigma = math.sqrt(expected * (1 - expected) / mask.numel())
    assert abs(mask.double().mean().item() - expected) <= 4 * sigma


@fixed_seeds
@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (0, 8), (1, 0), (2, 0), (8, 0), (1, 1)])
def test_neighbours_are_uncorrelated(shift, seed, device):
    p, rows, cols = 0.5, 512, 1024
    mask = dropout.keep_mask(seed_tensor(seed, device), rows, cols, p).double() * 2 - 1
    product = mask[shift[0] :, shift[1] :] * mask[: rows - shift[0], : cols - shift[1]]
    assert abs(product.mean().item()) <= 4.5 / math.sqrt(product.numel())


@fixed_seeds
def test_seeds_that_differ_in_one_bit_are_uncorrelated(seed, device):
    base = dropout.keep_mask(seed_tensor(seed, device), 256, 256, 0.5)
    for bit in (0, 1, 31, 32, 62):
        other = dropout.keep_mask(seed_tensor(seed ^ (1 << bit), device), 256, 256, 0.5)
        agreement = (base == other).double().mean().item()
        assert abs(agreement - 0.5) <= 4.5 * 0.5 / 256


@fixed_seeds
@pytest.mark.parametrize("axis", [0, 1])
def test_every_row_and_column_has_its_own_fair_share(axis, seed, device):
    p, n = 0.3, 1024
    mask = dropout.keep_mask(seed_tensor(seed, device), n, n, p).double()
    keep = 1 / dropout.keep_scale(p)
    z = (mask.mean(axis) - keep) / math.sqrt(keep * (1 - keep) / n)
    # z² over n lines is chi-square with n degrees of freedom: mean n, variance 2n
    assert abs(z.square().sum().item() - n) <= 5 * math.sqrt(2 * n)
    assert z.abs().max().item() <= 6


def test_a_gpu_takes_a_layers_mask_in_one_go(nothing_remembered, monkeypatch):
    """Each operator is a launch there: 55 in all, and not for every million elements."""
    monkeypatch.setattr(cpu, "_calls_at_once", lambda device: cpu._CALLS_AT_ONCE_ELSEWHERE)
    monkeypatch.setattr(cpu, "_keeps", lambda calls, device: False)
    seen = Operators()
    with seen:
        slices = list(dropout.masks(seed_tensor(7, "cpu"), 2048, 4096, 0.1, torch.float32))
    assert len(slices) == 1
    assert len(seen.names) < 60, seen.names


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info for returned in func._schema.returns) or "_" in func._opname:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))
