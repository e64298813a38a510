"""The interleaved loop on a clock of its own, and the timing of CUDA if there is a GPU."""

import contextlib
import gc
import itertools
import statistics

import pytest
import torch

from lora_kernels.tuning import stopwatch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Steps:
    """Steps that take a known time each and write down what is called."""

    def __init__(self, **durations):
        self.now, self.log = 0.0, []
        self.steps = {name: self._step(name, duration) for name, duration in durations.items()}

    def _step(self, name, duration):
        def prepare():
            self.now += 100.0
            self.log.append(("prepare", name))

        def call():
            self.now += duration
            self.log.append(("call", name))

        return stopwatch.Step(call, prepare)

    def stopwatch(self, call):
        start = self.now
        call()
        return self.now - start

    def interleave(self, seconds):
        return stopwatch.interleave(self.steps, seconds, self.stopwatch, clock=lambda: self.now)


def test_interleave_of_no_steps_ends_at_once():
    assert stopwatch.interleave({}, seconds=60) == {}


def test_interleave_calls_each_step_once_a_round():
    fake = Steps(a=1.0, b=2.0, c=3.0)
    samples = fake.interleave(seconds=30_000)
    called = [name for kind, name in fake.log if kind == "call"]
    rounds = [sorted(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert rounds == [["a", "b", "c"]] * (stopwatch.WARMUP_ROUNDS + len(samples["a"]))
    assert len(samples["a"]) == len(samples["b"]) == len(samples["c"]) > stopwatch.MIN_ROUNDS


def test_interleave_changes_the_order_so_that_every_step_follows_every_other():
    fake = Steps(a=1.0, b=1.0, c=1.0)
    fake.interleave(seconds=60_000)
    called = [name for kind, name in fake.log if kind == "call"]
    pairs = set(itertools.pairwise(called))
    assert pairs >= {(p, q) for p in "abc" for q in "abc" if p != q}


def test_interleave_times_the_calls_without_preparation_and_warm_up():
    samples = Steps(a=1.0, b=2.0).interleave(seconds=0)
    assert samples == {"a": [1.0] * stopwatch.MIN_ROUNDS, "b": [2.0] * stopwatch.MIN_ROUNDS}


def test_interleave_prepares_each_call_right_before():
    fake = Steps(a=1.0, b=1.0)
    fake.interleave(seconds=0)
    for prepare, call in zip(fake.log[::2], fake.log[1::2], strict=True):
        assert (prepare[0], call[0]) == ("prepare", "call")
        assert prepare[1] == call[1]


def test_interleave_turns_the_garbage_collector_on_after_a_step_that_raises():
    def fail():
        raise RuntimeError("step")

    try:
        stopwatch.interleave({"a": stopwatch.Step(fail)}, 0)
    except RuntimeError:
        assert gc.isenabled()
    else:
        raise AssertionError("the error of a step was lost")


def test_interleave_gives_the_times_of_one_layer_of_a_stack():
    samples = stopwatch.interleave(
        {"a": stopwatch.Step(lambda: None, times=4)}, 0, lambda call: 8.0
    )
    assert set(samples["a"]) == {2.0}


def test_interleave_enters_the_context_around_the_call_and_leaves_it_before_the_next():
    inside = []

    @contextlib.contextmanager
    def context():
        assert not inside
        inside.append("a")
        yield
        inside.clear()

    seen = []
    steps = {
        "a": stopwatch.Step(lambda: seen.append(inside[:]), context=context),
        "b": stopwatch.Step(lambda: seen.append(inside[:])),
    }
    stopwatch.interleave(steps, 0)
    assert [value for value in seen if value] == [["a"]] * (len(seen) // 2)


def test_interleave_cancels_a_drift_of_the_machine():
    """Everything slows down as it goes; one step after the other would tell another ratio."""
    fake = Steps()

    def slowing(duration):
        def call():
            fake.now += duration * (1 + fake.now / 1000)

        return stopwatch.Step(call)

    fake.steps = {"fast": slowing(1.0), "slow": slowing(1.1)}
    samples = fake.interleave(seconds=2000)
    assert max(samples["fast"]) > 2 * min(samples["fast"])
    ratios = [slow / fast for slow, fast in zip(samples["slow"], samples["fast"], strict=True)]
    assert statistics.median(ratios) == pytest.approx(1.1, rel=0.01)
    half = len(samples["fast"]) // 2
    one_after_the_other = statistics.median(samples["slow"][half:]) / statistics.median(
        samples["fast"][:half]
    )
    assert one_after_the_other > 1.3


def test_cold_copies_do_not_fit_into_l2_and_are_bounded():
    weight = torch.empty(1024, 1024)  # 4 MiB
    assert stopwatch.cold_copies(weight, l2=50 << 20) == 38
    assert stopwatch.cold_copies(weight, l2=1 << 20) == 1
    assert stopwatch.cold_copies(weight, l2=50 << 30) == stopwatch.MOST_COPIES


@needs_gpu
@pytest.mark.parametrize("hide_launch", [True, False])
def test_events_measure_a_longer_call_as_longer(hide_launch):
    x = torch.randn(2048, 2048, device="cuda")

    def products(count):
        return lambda: [x @ x for _ in range(count)]

    timer = stopwatch.Events(hide_launch)
    for count in (1, 20):
        timer(products(count))
    assert timer(products(20)) > 5 * timer(products(1))


@needs_gpu
def test_capture_refuses_a_step_that_repeats_its_dropout():
    x = torch.randn(32, 64, device="cuda")
    with pytest.raises(stopwatch.CannotCaptureError, match="repeats its dropout mask"):
        stopwatch.capture(stopwatch.Step(lambda: [x * 2]), draws=True)


@needs_gpu
def test_capture_refuses_a_step_that_waits_for_the_gpu():
    x = torch.ones(1, device="cuda")
    with pytest.raises(stopwatch.CannotCaptureError, match="not under a CUDA graph"):
        stopwatch.capture(stopwatch.Step(lambda: [x * x.item()]), draws=False)
