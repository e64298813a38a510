"""What the tests of kernels over segments share: routings, ranks, operands between NaN."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from lora_kernels.kernels import segments
from lora_kernels.kernels.config import SkinnyConfig
from lora_kernels.kernels.operands import GroupedOperands
from lora_kernels.testing.grouped_problem import make_grouped_problem
from lora_kernels.testing.memory import between_nan, guarded_outputs
from lora_kernels.testing.tolerance import assert_close
from tests.kernels.cases import GPU, tiles

# Segments longer and shorter than a tile, without rows, without a group, and of a group that has
# others; rows behind the last end; rows gathered out of order. K, N, R of each.
ROUTINGS = {
    "in order": ((17, 0, 3, 1), {}, (7, 11, 1)),
    "several of a group": (
        (5, 18, 0, 7, 4), {"groups": (1, 0, -1, 1, 0), "behind": 2}, (33, 17, 5),
    ),
    "gathered": ((3, 16, 18), {"groups": (1, -1, 0), "sources": 11, "behind": 2}, (24, 40, 8)),
    "experts": (
        (9, 0, 17, 2), {"experts": 2, "groups": (0, 1, 2, -1), "behind": 18}, (20, 15, 70),
    ),
    "no rows in a segment": ((0, 0), {"behind": 3}, (9, 16, 2)),
}  # fmt: skip

routings = pytest.mark.parametrize("routing", ROUTINGS)
dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def small(kernel: str):
    """On a CPU tiles so small that every segment takes several; on a GPU the table's."""
    found = tiles(kernel) if GPU else [SkinnyConfig(16, 16, num_warps=4, num_stages=1)]
    return pytest.mark.parametrize("config", found, ids=str)


def operands(
    routing, dtype, device, dropout_p=0.0, aligned=True, bias=True, product=True, lora_dtype=None
):
    """A grouped problem's operands between NaN, with another p and scaling in each group.

    What nobody may read is NaN: rows of h and dh without a group; with experts all rows behind the
    last end. product: whether the large product reads the other rows, so that they have numbers.
    """
    sizes, options, (k, n, r) = ROUTINGS[routing]
    groups = options.get("groups", range(len(sizes)))
    count = max(groups) + 1
    problem = make_grouped_problem(
        sizes, k, n, r, device=device, dtype=dtype, bias=bias, lora_dtype=lora_dtype,
        scalings=tuple(0.5 + g for g in range(count)),
        dropout_ps=tuple(dropout_p * (g % 3) / 2 for g in range(count)), **options,
    )  # fmt: skip
    o = GroupedOperands(problem)
    for name in ("x", "w", "a", "b", "dy", "y", "dx"):
        setattr(o, name, between_nan(getattr(o, name), aligned))
    has_group = torch.zeros(len(o.dy), dtype=torch.bool, device=device)
    for segment in o.segments():
        has_group[segment.rows] = segment.group >= 0
    o.h[~has_group] = o.dh[~has_group] = torch.nan
    unread = ~has_group
    if product:
        behind = torch.arange(len(o.dy), device=device) >= problem.ends[-1]
        unread = behind if o.experts else torch.zeros_like(behind)
    o.dy[unread] = o.y[unread] = o.dx[unread] = torch.nan
    if problem.index is None:
        o.x[unread] = torch.nan
    return o


@contextlib.contextmanager
def scratch_of_nan() -> Iterator[None]:
    """What new_empty gives, of which not all is written, is full of NaN."""
    new_empty = torch.Tensor.new_empty

    def full(self, *args, **options):
        out = new_empty(self, *args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    with mock.patch.object(torch.Tensor, "new_empty", full):
        yield


def check(launch: Callable, formula: Callable, o: GroupedOperands, dtype, config) -> None:
    """The launcher computes its formula in dtype, and writes its output and no more.

    With a configuration, programs look at so few ends in a step that they take several.
    """
    few = mock.patch.object(segments, "BLOCK_Q", 2 if config else segments.BLOCK_Q)
    with guarded_outputs(), scratch_of_nan(), few:
        (output,) = launch(o, config)
    (exact,), (baseline,) = formula(o, torch.float64), formula(o, dtype)
    assert_close(output, exact, baseline.to(dtype))
