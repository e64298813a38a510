"""Tiles out of the cache: which take the place of a table's, and which are ignored."""

import math
import warnings

import pytest
import torch

from lora_kernels.dispatch import cache as caches
from lora_kernels.dispatch import measured
from lora_kernels.kernels import measured_tiles, shrink
from lora_kernels.kernels.config import SkinnyConfig, When, select, target_of
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.numerics import numerics_of
from lora_kernels.testing.problem import make_problem
from lora_kernels.tuning.check import check
from tests.calls import solve

OTHER = SkinnyConfig(32, 16, num_warps=2, num_stages=1, programs_per_sm=3)


@pytest.fixture(autouse=True)
def untuned(cache):
    """The tables are as they ship, before the test and after it."""
    tables = {name: list(k.tiles["interpreter"]) for name, k in measured_tiles.KERNELS.items()
              if k.tiles}  # fmt: skip
    measured_tiles.use.cache_clear()
    yield
    for name, table in tables.items():
        measured_tiles.KERNELS[name].tiles["interpreter"][:] = table
    measured_tiles.use.cache_clear()
    select.cache_clear()


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="changes the CPU's table")


def config(device):
    numerics = numerics_of(torch.empty(1, device=device))
    return shrink.config_for(device, 16, numerics)


@needs_no_gpu
def test_tiles_take_the_place_of_the_tables_entry(device, seed):
    problem = make_problem(70, 40, 30, 4, device=device, dropout_p=0.3)
    shipped = config(device)
    measured.add(device, tiles=[measured_tiles.as_json("shrink", When(), OTHER)])
    assert config(device) is shipped  # not before it is asked for
    measured.forget()
    measured_tiles.use(device)
    assert config(device) == OTHER
    assert len(shrink.TILES[target_of(device)]) == 1
    exact, results = problem.solve(torch.float64), solve(problem)
    for name, result in results.items():
        torch.testing.assert_close(result.double(), exact[name], rtol=1e-4, atol=1e-4)


@needs_no_gpu
def test_they_are_what_is_checked(device, monkeypatch):
    measured.add(device, tiles=[measured_tiles.as_json("shrink", When(), OTHER)])
    measured.forget()
    warps = set()

    def noted(function, grid, **arguments):
        warps.add(arguments["num_warps"])
        launch(function, grid, **arguments)

    monkeypatch.setattr(shrink, "launch", noted)
    checked = check(device.type, ["shrink"], jobs=1)
    assert {each.reason for each in checked} == {None}
    assert warps == {OTHER.num_warps}
    assert all(str(OTHER) in key for key in caches.read("checked", device))


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "shrunk"}, {"kernel": "split_k_reduce"}, {"when": {"bits": 7, "m": None,
         "r": None, "tma": False}}, {"when": {}}, {"config": {"type": "Skinny"}}, {"config": None},
        {"config": {"type": "SkinnyConfig", "BLOCK_ROWS": "32", "BLOCK_COLS": 16, "num_warps": 2,
         "num_stages": 1, "programs_per_sm": 3}},
        {"config": {"type": "SkinnyConfig", "BLOCK_ROWS": 0, "BLOCK_COLS": 16, "num_warps": 2,
         "num_stages": 1, "programs_per_sm": 3}},
        {"config": {"type": "SkinnyConfig", "BLOCK_ROWS": 32, "BLOCK_COLS": 16, "num_warps": 2,
         "num_stages": 1, "programs_per_sm": -3}},
    ],
    ids=str,
)  # fmt: skip
@needs_no_gpu
def test_tiles_of_another_kind_are_ignored_with_one_line(change, device):
    shipped = config(device)
    right = measured_tiles.as_json("shrink", When(), OTHER)
    measured.add(device, tiles=[right, {**right, **change}])
    measured.forget()
    with pytest.warns(RuntimeWarning, match="is ignored: of its tiles"):
        measured_tiles.use(device)
    assert config(device) is shipped  # all or nothing


@needs_no_gpu
def test_without_a_file_nothing_changes(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured_tiles.use(device)


def test_an_entry_survives_the_file():
    when = When(bits=32, m=64, r=math.inf, tma=True)
    assert measured_tiles._parsed(measured_tiles.as_json("shrink", when, OTHER)) == (when, OTHER)
