"""The interleaved loop, on a clock of its own."""

import contextlib
import gc
import itertools
import statistics

import pytest
import torch

from bench import timing


class Steps:
    """Providers that take a known time each and write down what is called."""

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

        return timing.Step(call, prepare)

    def stopwatch(self, call):
        start = self.now
        call()
        return self.now - start

    def interleave(self, seconds):
        return timing.interleave(self.steps, seconds, self.stopwatch, clock=lambda: self.now)


def test_every_round_calls_each_provider_once():
    fake = Steps(a=1.0, b=2.0, c=3.0)
    samples = fake.interleave(seconds=30_000)
    called = [name for kind, name in fake.log if kind == "call"]
    rounds = [sorted(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert rounds == [["a", "b", "c"]] * (timing.WARMUP_ROUNDS + len(samples["a"]))
    assert len(samples["a"]) == len(samples["b"]) == len(samples["c"]) > timing.MIN_ROUNDS


def test_rounds_change_their_order_so_that_every_provider_follows_every_other():
    fake = Steps(a=1.0, b=1.0, c=1.0)
    fake.interleave(seconds=60_000)
    called = [name for kind, name in fake.log if kind == "call"]
    pairs = set(itertools.pairwise(called))
    assert pairs >= {(p, q) for p in "abc" for q in "abc" if p != q}


def test_times_are_those_of_the_calls_without_preparation_and_warm_up():
    samples = Steps(a=1.0, b=2.0).interleave(seconds=0)
    assert samples == {"a": [1.0] * timing.MIN_ROUNDS, "b": [2.0] * timing.MIN_ROUNDS}


def test_each_call_is_prepared_right_before():
    fake = Steps(a=1.0, b=1.0)
    fake.interleave(seconds=0)
    for prepare, call in zip(fake.log[::2], fake.log[1::2], strict=True):
        assert (prepare[0], call[0]) == ("prepare", "call")
        assert prepare[1] == call[1]


def test_garbage_collector_is_back_on_after_a_step_that_raises():
    def fail():
        raise RuntimeError("step")

    try:
        timing.interleave({"a": timing.Step(fail)}, 0)
    except RuntimeError:
        assert gc.isenabled()
    else:
        raise AssertionError("the error of a step was lost")


def test_times_of_a_stack_are_those_of_one_of_its_layers():
    samples = timing.interleave({"a": timing.Step(lambda: None, times=4)}, 0, lambda call: 8.0)
    assert set(samples["a"]) == {2.0}


def test_context_is_around_the_call_and_left_before_the_next():
    inside = []

    @contextlib.contextmanager
    def context():
        assert not inside
        inside.append("a")
        yield
        inside.clear()

    seen = []
    steps = {
        "a": timing.Step(lambda: seen.append(inside[:]), context=context),
        "b": timing.Step(lambda: seen.append(inside[:])),
    }
    timing.interleave(steps, 0)
    assert [value for value in seen if value] == [["a"]] * (len(seen) // 2)


def test_interleaving_cancels_a_drift_of_the_machine():
    """Everything slows down as it goes; one provider after the other would tell another ratio."""
    fake = Steps()

    def slowing(duration):
        def call():
            fake.now += duration * (1 + fake.now / 1000)

        return timing.Step(call)

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


def stack(mode):
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    x, dy = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    return layers, x, dy, timing.step(layers, x, dy, mode)


def test_forward_step_returns_each_output(seed):
    layers, x, _, step = stack("forward")
    for y, layer in zip(step.call(), layers, strict=True):
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", ["backward", "forward+backward"])
def test_backward_steps_return_the_gradients_in_reverse_and_accumulate_nothing(mode, seed):
    layers, x, dy, step = stack(mode)
    expected = [
        grad
        for layer in reversed(layers)
        for grad in torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
    ]
    for _ in range(2):
        step.prepare()
        for actual, grad in zip(step.call(), expected, strict=True):
            assert torch.equal(actual, grad)
    assert x.grad is layers[0].weight.grad is None


def test_forward_of_a_backward_step_is_not_part_of_the_call():
    layers, _, _, step = stack("backward")
    forwards = []
    layers[0].register_forward_hook(lambda *_: forwards.append(1))
    step.prepare()
    assert forwards == [1]
    step.call()
    assert forwards == [1]
