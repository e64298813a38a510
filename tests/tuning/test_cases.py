"""Cases: what is tried of a launcher at a shape, what is skipped, what is timed and told."""

import dataclasses
import sys

import pytest
import torch

from lora_kernels.kernels.config import GemmConfig, SkinnyConfig, When, select, target_of
from lora_kernels.kernels.registry import LAUNCHERS, kernel_of
from lora_kernels.tuning import candidates, cases, stopwatch
from lora_kernels.tuning.candidates import source
from lora_kernels.tuning.shapes import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(80, 48, 40, 3, 0.25, dtype=torch.float16, device=DEVICE)
FEW = dataclasses.replace(SHAPE, m=13)  # what gemm_small_m takes
FAILING, WRONG, SLOW, RIGHT = (SkinnyConfig(16, cols, 4, 2) for cols in (16, 32, 64, 128))


def shape_for(name):
    return FEW if kernel_of(name).name == "gemm_small_m" else SHAPE


@pytest.fixture
def set_table(monkeypatch):
    """Replaces what a launcher's table has for this machine."""

    def replace(name, entries):
        monkeypatch.setitem(kernel_of(name).tiles, target_of(torch.device(DEVICE)), entries)
        select.cache_clear()

    yield replace
    select.cache_clear()


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(stopwatch, "MIN_ROUNDS", 3)
    monkeypatch.setattr(stopwatch, "WARMUP_ROUNDS", 0)


def test_cases_of_gemm_small_m_are_those_that_it_supports():
    cells = [dataclasses.replace(SHAPE, m=m, dropout_p=p) for m in (16, 17, 65) for p in (0.0, 0.1)]
    found = cases.cases(["gemm_small_m"], cells, 1)
    tuned = [(case.shape.m, case.shape.dropout_p) for case in found]
    assert tuned == [(16, 0.0), (16, 0.1), (17, 0.0)]


@pytest.mark.parametrize(
    ("m", "when", "tma"), [(16, When(m=64), {False}), (80, When(tma=True), {True, False})], ids=str
)
@pytest.mark.parametrize("name", ["gemm_fwd", "gemm_bwd"])
def test_cases_try_descriptors_if_the_entry_is_for_matrices_that_they_hold(
    name, m, when, tma, set_table
):
    whens = (When(m=64), When(tma=True), When())
    set_table(name, [(each, GemmConfig(16, 16, 16, 4, 1)) for each in whens])
    (case,) = cases.cases([name], [dataclasses.replace(SHAPE, m=m)], limit=None)
    assert case.when == when
    assert {config.tma for config in case.others} == tma


def test_cases_join_shapes_that_do_not_differ_for_a_launcher():
    cells = [dataclasses.replace(FEW, n=n, dropout_p=p) for n in (40, 56) for p in (0.0, 0.25)]
    counts = dict.fromkeys(LAUNCHERS, 0)
    for case in cases.cases(list(LAUNCHERS), cells, limit=1):
        counts[case.name] += 1
    assert counts == {
        "shrink": 2, "gemm_fwd": 2, "gemm_small_m": 4, "expand_y": 2, "expand_dx": 2,
        "expand_add_y": 2, "expand_grad_a": 2, "grad_b": 2, "gemm_bwd": 4, "grad_a": 2,
        "dequantize_4bit": 2, "weight_norm": 2,
        "gemm_fwd_scaled": 2, "gemm_small_m_scaled": 4, "expand_scale_y": 2, "expand_split_y": 2,
        "expand_mask_dx": 1, "grad_b_scaled": 2, "apply_dropout": 1, "column_sums": 2,
        "grouped_shrink_h": 2, "grouped_shrink_dh": 2, "grouped_gemm_y": 2, "grouped_gemm_dx": 4,
        "grouped_expand_y": 2, "grouped_expand_dx": 2, "grouped_grad_a": 2, "grouped_grad_b": 2,
    }  # fmt: skip


@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_cases_tune_the_entry_that_the_launcher_takes(name, dtype, m, set_table, monkeypatch):
    whens = (
        When(r=2), When(bits=32, m=16), When(bits=32), When(m=16), When(tma=True), When(),
    )  # fmt: skip
    sizes = [(16, 32), (32, 16), (32, 32), (64, 32), (32, 64), (64, 64)]
    if kernel_of(name).is_gemm:
        configs = [GemmConfig(*size, 16, 4, 1) for size in sizes]
    else:
        configs = [SkinnyConfig(*size, 4, 1) for size in sizes]
    entries = list(zip(whens, configs, strict=True))
    set_table(name, entries)
    dropout_p = 0.25 if name in ("apply_dropout", "expand_mask_dx") else 0.0
    shape = dataclasses.replace(SHAPE, m=m, dtype=dtype, dropout_p=dropout_p)
    (case,) = cases.cases([name], [shape], limit=1)
    launched = []
    module = sys.modules[kernel_of(name).function.fn.__module__]
    monkeypatch.setattr(module, "launch", lambda *args, **meta: launched.append(meta))
    LAUNCHERS[name](candidates.operands(case.shape))

    assert (case.when, case.table) in entries
    blocks = [v for what, v in launched[0].items() if what in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    assert blocks == [v for what, v in vars(case.table).items() if what.startswith("BLOCK_")]


def test_cases_tell_entries_with_equal_tiles_from_each_other(set_table):
    set_table("grad_b", [(When(r=2), RIGHT), (When(), dataclasses.replace(RIGHT))])
    shapes = [dataclasses.replace(SHAPE, r=r) for r in (2, 3)]
    found = cases.cases(["grad_b"], shapes, limit=1)
    assert [case.when for case in found] == [When(r=2), When()]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_cases_try_the_tables_own_once(name, set_table):
    grid = candidates.grid(name, shape_for(name), When(tma=True))
    set_table(name, [(When(tma=True), grid[5]), (When(), dataclasses.replace(grid[5]))])
    (case,) = cases.cases([name], [shape_for(name)], limit=None)
    assert case.table == grid[5]
    assert set(grid) - {grid[5]} >= set(case.others)
    assert case.table not in case.others
    assert len(case.others) > 10


@pytest.mark.parametrize(("m", "dtype"), [(16, torch.float32), (80, torch.float16)], ids=str)
def test_measure_times_every_launcher_by_its_table_and_by_candidates(m, dtype, few_rounds):
    cell = dataclasses.replace(SHAPE, m=m, dtype=dtype)
    # Those over segments do not differ for a small m. The interpreter is too slow for all of both.
    names = [name for name in LAUNCHERS if name.startswith("grouped") == (m > 16)]
    for case in cases.cases(names, [cell], limit=1):
        configs = (case.table, *case.others)
        measured, samples = cases.measure(case, configs, {}, seconds=0)
        assert [row["reason"] for row in measured] == [None, None]
        assert samples.keys() == set(configs)
        assert all(row["gb_s"] > 0 and row["tflop_s"] > 0 for row in measured)


@pytest.fixture
def faulty(monkeypatch, few_rounds):
    """A case of shrink whose candidates have faults, and the configurations that were launched."""
    (case,) = cases.cases(["shrink"], [SHAPE], limit=1)
    case = dataclasses.replace(case, others=(SLOW, FAILING, WRONG, RIGHT))
    launched, launcher = [], LAUNCHERS["shrink"]

    def call(o, config):
        launched.append(config)
        if config == FAILING:
            raise RuntimeError("out of resource:\n shared memory")
        for _ in range(6 if config == SLOW else 1):
            (h,) = launcher.call(o, config)
        return (h * 1.05 if config == WRONG else h,)

    monkeypatch.setitem(LAUNCHERS, "shrink", dataclasses.replace(launcher, call=call))
    return case, launched


def test_measure_skips_failing_and_wrong_candidates_and_ranks_a_slow_one_behind(faulty):
    case, _ = faulty
    configs = (case.table, *case.others)
    measured, samples = cases.measure(case, configs, {}, seconds=0)
    by_config = dict(zip(configs, measured, strict=True))
    assert by_config[FAILING]["reason"] == "RuntimeError: out of resource: shared memory"
    assert by_config[WRONG]["reason"].startswith("wrong: result rms error")
    assert samples.keys() == {case.table, SLOW, RIGHT}
    assert by_config[SLOW]["over_table"][0] > 2 * by_config[RIGHT]["over_table"][0]
    for config in (FAILING, WRONG):
        assert by_config[config]["median_ms"] is by_config[config]["over_table"] is None

    lines = cases.report(case, measured, configs).splitlines()
    assert [line.rpartition("  ")[2] for line in lines[1:4]] == [
        source(case.table), source(RIGHT), source(SLOW),
    ]  # fmt: skip
    assert f"no time: {source(FAILING)}: RuntimeError" in lines[4]
    assert f"no time: {source(WRONG)}: wrong" in lines[5]
    assert "3 of 5 timed" in lines[0]


def test_measure_does_not_launch_again_what_is_known_to_fail(faulty):
    case, launched = faulty
    measured, _ = cases.measure(case, (case.table, SLOW), {SLOW: "it died"}, seconds=0)
    assert [row["reason"] for row in measured] == [None, "it died"]
    assert set(launched) == {None}  # the launcher asks its table
