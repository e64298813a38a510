"""lora-kernels tune on a small shape: what is timed, what is kept, and what is not chosen."""

import pytest
import torch

from lora_kernels.dispatch import measured
from lora_kernels.dispatch.algorithm import choose
from lora_kernels.dispatch.fallback import KernelError
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.kernels import linear, measured_tiles
from lora_kernels.kernels.config import SkinnyConfig
from lora_kernels.tuning import cases, user
from lora_kernels.tuning.shapes import Layer
from lora_kernels.tuning.stopwatch import CannotCaptureError
from lora_kernels.tuning.user import Plan, tune
from lora_kernels.tuning.verdicts import Verdict

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the interpreter")
BEST = SkinnyConfig(32, 32, num_warps=4, num_stages=1)


def plan(device, seconds=1000.0, **changes) -> Plan:
    values = {
        "dtype": torch.float32, "layers": (Layer(24, 20),), "tokens": (70,), "ranks": (4,),
        "dropout": (0.3,), "factors": (None,), "seconds": seconds, "jobs": 1,
    }  # fmt: skip
    return Plan(device, **{**values, **changes})


@pytest.fixture
def quick(cache, monkeypatch):
    """Two rounds each, no tiles, and the choice as a user's process makes it."""
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    monkeypatch.setattr(user.stopwatch, "MIN_ROUNDS", 2)
    monkeypatch.setattr(user.stopwatch, "WARMUP_ROUNDS", 0)
    monkeypatch.setattr(user, "_LEAST", 1e9)  # there is never time for more than MIN_ROUNDS
    monkeypatch.setattr(user, "_tune_tiles", lambda *others: 0)
    measured_tiles.use.cache_clear()
    yield
    measured_tiles.use.cache_clear()


@pytest.fixture
def all_cells(quick, monkeypatch):
    monkeypatch.setattr(user, "_LEAST", -1e9)


def asked(device, **changes) -> GemmShape:
    return GemmShape(**{"m": 70, "n": 20, "k": 24, "r": 4, "dtype": torch.float32,
                        "device": device, "dropout": True, **changes})  # fmt: skip


def slow(name: str, monkeypatch):
    """Plants a slow algorithm: by the stopwatch it takes twice as long as any other, always."""
    last = []

    def stopwatch(call) -> float:
        call()
        return 2.0 if last[-1] == name else 1.0

    for function in ("lora_linear_forward", "lora_linear_backward"):
        original = getattr(linear, function)

        def noted(algorithm, *operands, original=original):
            last.append(algorithm)
            return original(algorithm, *operands)

        monkeypatch.setattr(linear, function, noted)
    monkeypatch.setattr(user.stopwatch, "stopwatch_of", lambda device, hide_launch: stopwatch)


@needs_no_gpu
@pytest.mark.parametrize("name", ["fused", "addmm"])
def test_a_slow_plan_is_not_chosen(name, all_cells, monkeypatch, device):
    slow(name, monkeypatch)
    lines = []
    assert tune(plan(device, seconds=0.0), lines.append) == 2
    other = {"fused": "addmm", "addmm": "fused"}[name]
    for backward in (False, True):
        chosen = choose(asked(device, backward=backward))
        assert chosen == (other, "measured on this GPU"), lines
    assert len(lines) == 3
    assert all(line.endswith(f": {other}") for line in lines[1:])


@needs_no_gpu
def test_a_wrong_algorithm_is_not_chosen(all_cells, monkeypatch, device):
    slow("addmm", monkeypatch)
    forward = linear.lora_linear_forward

    def wrong(algorithm, *operands):
        y, h = forward(algorithm, *operands)
        return (y * 1.1 if algorithm == "fused" else y), h

    monkeypatch.setattr(linear, "lora_linear_forward", wrong)
    lines = []
    tune(plan(device, seconds=0.0), lines.append)
    assert choose(asked(device)) == ("addmm", "measured on this GPU")
    assert any("fused float32 r=4 dropout is not used: WrongKernelError" in line for line in lines)


@needs_no_gpu
@pytest.mark.parametrize(("tokens", "dropout"), [(16, 0.3), (64, 0.0)])
def test_the_kernel_of_few_rows_is_checked_before_it_is_timed(
    tokens, dropout, all_cells, monkeypatch, device
):
    original = linear.gemm_small_m

    def wrong(*operands, **options):
        y, h = original(*operands, **options)
        return y * 1.1, h

    monkeypatch.setattr(linear, "gemm_small_m", wrong)
    slow("addmm", monkeypatch)
    lines = []
    tune(plan(device, 0.0, tokens=(tokens, 70), dropout=(dropout,)), lines.append)
    few, many = (asked(device, m=m, dropout=dropout > 0) for m in (tokens, 70))
    assert choose(few).name == "addmm", lines
    assert choose(many).name == "fused", lines


@needs_no_gpu
@pytest.mark.parametrize("error", [
    KernelError("OutOfResources: shared memory"), CannotCaptureError("not under a CUDA graph"),
    torch.OutOfMemoryError("CUDA out of memory"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_a_product_that_cannot_be_timed_is_left_out(error, all_cells, monkeypatch, device):
    step = user._step

    def fails(shape, mode, algorithm):
        if shape.m == 70 and mode == user.FORWARD:
            raise error
        return step(shape, mode, algorithm)

    monkeypatch.setattr(user, "_step", fails)
    lines = []
    assert tune(plan(device, 0.0, tokens=(70, 300)), lines.append) == 3
    (said,) = [line for line in lines if "not compared" in line]
    assert said.startswith("  forward 70 x 24 -> 20 r=4 p=0.3: not compared: ")
    assert str(error) in said
    reasons = [choose(asked(device, m=m)).reason for m in (70, 300)]
    assert reasons == ["TRITON_INTERPRET=1", "measured on this GPU"]


@needs_no_gpu
def test_factors_of_another_dtype_are_measured_for_themselves(all_cells, monkeypatch, device):
    slow("fused", monkeypatch)
    lines = []
    both = plan(device, 0.0, dtype=torch.float16, factors=(None, torch.float32))
    assert tune(both, lines.append) == 4
    assert sum(" float32 factors: fused takes " in line for line in lines) == 2
    half = asked(device, dtype=torch.float16)
    for uniform in (True, False):
        assert choose(half._replace(uniform=uniform)) == ("addmm", "measured on this GPU")


@needs_no_gpu
def test_a_measurement_says_nothing_of_factors_in_another_dtype(all_cells, monkeypatch, device):
    slow("fused", monkeypatch)
    tune(plan(device, seconds=0.0, dtype=torch.float16), lambda line: None)
    half = asked(device, dtype=torch.float16)
    assert choose(half).reason == "measured on this GPU"
    assert choose(half._replace(uniform=False)).reason == "TRITON_INTERPRET=1"


@needs_no_gpu
def test_entries_reach_halfway_to_their_neighbours(all_cells, monkeypatch, device):
    slow("fused", monkeypatch)
    tune(plan(device, seconds=0.0, tokens=(16, 64)), lambda line: None)
    entries = measured.entries(device, (0, 0))
    assert {entry.m for entry in entries if entry.backward} == {(8, 32), (32, 128)}
    # With dropout one kernel serves 16 rows of a forward; 17 run other kernels.
    assert {entry.m for entry in entries if not entry.backward} == {(8, 16), (32, 128)}
    assert choose(asked(device, m=129)).reason == "TRITON_INTERPRET=1"
    assert choose(asked(device, m=17)).reason == "TRITON_INTERPRET=1"
    assert choose(asked(device, m=8)).reason == "measured on this GPU"


@needs_no_gpu
def test_what_was_measured_before_an_end_is_kept(quick, monkeypatch, device):
    lines = []
    assert tune(plan(device, seconds=0.0), lines.append) == 1
    assert "1 of 2 products were not reached in time" in lines[-1]
    measured.forget()
    assert choose(asked(device)).reason == "measured on this GPU"


@pytest.fixture
def confirm(cache, monkeypatch):
    """Tiles of shrink that win and tiles of grad_b that do not, without a clock."""

    def verdict(group, samples, seconds):
        case = group[0]
        if case.name != "shrink":
            return [], None
        return [], Verdict(case.entry, case.when, case.table, BEST, (0.8, 0.7, 0.9), (0.8,))

    monkeypatch.setattr(user, "confirm", verdict)
    monkeypatch.setattr(user, "TUNED", ("shrink", "grad_b"))
    monkeypatch.setattr(user.cases, "measure", lambda *arguments: ([], {}))
    return verdict


@needs_no_gpu
def test_tiles_that_were_measured_before_an_interrupt_are_kept(confirm, monkeypatch, device):
    def interrupted(group, *others):
        if group[0].name == "grad_b":
            raise KeyboardInterrupt
        return confirm(group, *others)

    monkeypatch.setattr(user, "confirm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(plan(device), lambda line: None)
    measured.forget()
    assert [tile["kernel"] for tile in measured.tiles(device)] == ["shrink"]


@needs_no_gpu
def test_tiles_that_win_are_kept_and_used(confirm, monkeypatch, device):
    tables = {name: list(k.tiles["interpreter"]) for name, k in measured_tiles.KERNELS.items()
              if k.tiles}  # fmt: skip
    monkeypatch.setattr(user, "_compare", lambda *arguments: 0)
    measured_tiles.use.cache_clear()
    lines = []
    try:
        tune(plan(device), lines.append)
        assert any("shrink.py interpreter (any product): 0.800" in line for line in lines)
        (tile,) = measured.tiles(device)
        assert tile["kernel"] == "shrink"
        o = cases.candidates.operands(plan(device).shapes()[0])
        assert cases.entry_for("shrink", o)[1] == BEST
    finally:
        for name, table in tables.items():
            measured_tiles.KERNELS[name].tiles["interpreter"][:] = table
        measured_tiles.use.cache_clear()
        measured_tiles.select.cache_clear()


@needs_no_gpu
def test_a_launch_that_does_not_fit_into_memory_stops_no_other(confirm, monkeypatch, device):
    def measure(case, *others):
        if case.name == "shrink":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [], {}

    confirmed = []
    monkeypatch.setattr(user.cases, "measure", measure)
    monkeypatch.setattr(user, "confirm", lambda group, *_: (confirmed.append(group), ([], None))[1])
    monkeypatch.setattr(user, "_compare", lambda *arguments: 0)
    lines = []
    tune(plan(device), lines.append)
    assert len(confirmed) == 2
    assert any("shrink" in line and "not timed: OutOfMemoryError" in line for line in lines)


def test_candidates_fit_the_time(device):
    few, many = (plan(device, seconds=s).tile_cases() for s in (1.0, 100.0))
    assert [case.name for case in few] == [case.name for case in many]
    assert max(len(case.others) for case in few) == 1
    assert max(len(case.others) for case in many) > 1
