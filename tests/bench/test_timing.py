"""The interleaved loop, on a clock of its own."""

import gc
import itertools

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

        return prepare, call

    def interleave(self, seconds):
        return timing.interleave(self.steps, seconds, clock=lambda: self.now)


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
        timing.interleave({"a": (lambda: None, fail)}, 0)
    except RuntimeError:
        assert gc.isenabled()
    else:
        raise AssertionError("the error of a step was lost")


def test_step_runs_the_backward_only_where_asked_and_drops_old_gradients():
    layer = torch.nn.Linear(3, 2)
    x, dy = torch.ones(4, 3, requires_grad=True), torch.ones(4, 2)
    prepare, call = timing.step(layer, x, dy, "forward+backward")
    for _ in range(2):
        prepare()
        call()
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))
    assert x.grad is not None
    prepare, call = timing.step(layer, x, dy, "forward")
    prepare()
    call()
    assert layer.weight.grad is x.grad is None
