"""Segments on the device: which rows a tile has, of which group, and what the mask counts."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.kernels import segments
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.segments import Routing, group_of, locate_rows, row_of_group
from lora_kernels.spec import GroupedSpec

SIZES = (5, 0, 16, 17, 0, 1, 0, 3)
GROUPS = (1, 0, 0, -1, 1, 1, 2, 0)


@triton.jit
def _locate_kernel(segments, found_ptr, S, Q, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr):
    tile = tl.program_id(0)
    segment, start, end, row = locate_rows(segments, Q, S, tile, BLOCK, BLOCK_Q)
    group = group_of(segments, Q, segment)
    first = row_of_group(segments, Q, S, segment, group, row - start, BLOCK_Q)
    tl.store(found_ptr + tile * 6, segment)
    tl.store(found_ptr + tile * 6 + 1, start)
    tl.store(found_ptr + tile * 6 + 2, end)
    tl.store(found_ptr + tile * 6 + 3, row)
    tl.store(found_ptr + tile * 6 + 4, group)
    tl.store(found_ptr + tile * 6 + 5, first.to(tl.int32))


def expected(sizes, groups, behind, block):
    """Segment, start, end, row, group and the mask's row of every tile, in order."""
    found, seen, start = [], {}, 0
    numbered = [*enumerate(zip(sizes, groups, strict=True)), (len(sizes), (behind, -1))]
    for q, (size, group) in numbered:
        for row in range(start, start + size, block):
            mask_row = None if group < 0 else seen.get(group, 0) + row - start
            found.append([q, start, start + size, row, group, mask_row])
        seen[group] = seen.get(group, 0) + size
        start += size
    return found


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["in order", "groups"])
@pytest.mark.parametrize("behind", [0, 1, 20])
@pytest.mark.parametrize("block_q", [2, 8, 256])
def test_every_tile_finds_its_rows_and_none_is_left(block_q, behind, groups, device):
    ends = torch.tensor(SIZES, device=device).cumsum(0).to(torch.int32)
    as_tensor = None if groups is None else torch.tensor(groups, dtype=torch.int32, device=device)
    routing = Routing(ends, as_tensor, None, sum(SIZES) + behind)
    tiles = routing.tiles(16)
    found = torch.zeros(tiles, 6, dtype=torch.int32, device=device)
    arguments = routing.arguments() | {"BLOCK_Q": block_q}
    launch(_locate_kernel, (tiles,), found_ptr=found, BLOCK=16, **arguments)
    wanted = expected(SIZES, range(len(SIZES)) if groups is None else groups, behind, 16)
    for actual, tile in zip(found.tolist(), wanted, strict=False):
        assert actual[:5] == tile[:5]
        assert tile[5] is None or actual[5] == tile[5]
    assert len(wanted) <= tiles
    assert not found[len(wanted) :, :4].any()


def test_the_numbers_of_the_groups(device):
    spec = GroupedSpec((2.0, 3.0), (0.5,))
    numbers = segments.numbers_of(spec, 2, device)
    assert numbers.keep.tolist() == [2.0, 2.0]
    assert numbers.scaling.tolist() == [2.0, 3.0]
    assert numbers.scaling_keep.tolist() == [4.0, 6.0]
    assert numbers.thresholds.tolist() == [0, 0]
    assert segments.numbers_of(spec, 2, device) is numbers, "copied to the device once"


def test_experts_end_with_their_last_segments():
    ends = torch.tensor([1, 2, 5, 5, 6, 9], dtype=torch.int32)
    assert Routing(ends, None, None, 9, per_expert=2).by_expert().ends.tolist() == [2, 5, 9]


@pytest.mark.parametrize(("change", "copied"), [(lambda t: t, False), (lambda t: t.mT, True)])
def test_factors_are_copied_only_if_they_must(change, copied):
    factors = change(torch.zeros(1, 3, 4).expand(5, -1, -1))
    assert (segments.with_unit_rows(factors).data_ptr() != factors.data_ptr()) == copied


def test_no_tile_passes_the_rows_whatever_ends_say(device):
    ends = torch.tensor([4, 99, 120], dtype=torch.int32, device=device)
    routing = Routing(ends, None, None, 9)
    tiles = routing.tiles(2)
    found = torch.zeros(tiles, 6, dtype=torch.int32, device=device)
    launch(_locate_kernel, (tiles,), found_ptr=found, BLOCK=2, **routing.arguments())
    bounds = {tuple(tile[1:3]) for tile in found.tolist()}
    assert bounds == {(0, 4), (4, 9), (0, 0)}
