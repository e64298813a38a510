"""Rounds call every step once, and what a forward keeps is counted once."""

import contextlib

import torch

from bench.rounds import Subject, kept_bytes, median_ratio, rounds


def test_every_round_calls_every_subject_in_its_context():
    log, clock = [], iter(range(1000))

    @contextlib.contextmanager
    def context():
        log.append("in")
        yield
        log.append("out")

    subjects = {
        "a": Subject(lambda: log.append("a"), lambda: log.append("prepare"), context),
        "b": Subject(lambda: log.append("b")),
    }
    samples = rounds(subjects, 3, lambda: next(clock))
    assert samples == {"a": [1] * 3, "b": [1] * 3}
    assert log.count("a") == log.count("b") == 4  # one warms up
    first = log.index("prepare")
    assert log[first : first + 4] == ["prepare", "in", "a", "out"]


def test_ratios_are_taken_within_a_round():
    samples = {"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 1.0]}
    assert median_ratio(samples, "a", "b") == 2


class Hides(torch.autograd.Function):
    """Keeps a tensor where no hook of autograd sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x.double()
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_what_is_kept_is_counted_once_and_without_what_is_known():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def forward():
        y = (x @ w).relu()  # its output is kept, and once more by the product below
        return y * y

    assert kept_bytes(forward, [x, w]) == 4 * 8 * 4
    assert kept_bytes(lambda: Hides.apply(x), [x]) == 4 * 8 * 8
