"""A cell from beginning to end, with peers that are slow, wrong, broken or absent."""

import time

import pytest
import torch
from torch import nn

from bench import implementations, peers, report, rows
from bench.cells import Cell
from bench.implementations import Implementation, choose
from bench.measure import LayerSubject, measure, step
from lora_kernels.dispatch import fallback
from lora_kernels.tuning import stopwatch

CELL = Cell(m=32, k=48, n=40, r=4, dropout_p=0.0, mode="forward+backward")
CEILINGS = {"copy_tb_s": 0.02, "product_tflop_s": 0.1, "launch_us": 1.0}


class Slow(peers.Formula):
    def forward(self, x):
        time.sleep(0.05)  # far beyond what a busy machine adds to a small layer
        return super().forward(x)


class Wrong(peers.Formula):
    def forward(self, x):
        return super().forward(x) * 1.001


def broken(problem):
    raise RuntimeError("out of everything\nand more")


FLOOR = Implementation("frozen", implementations.frozen)
OURS = Implementation("lora_kernels", implementations.ours)


@pytest.fixture(scope="module")
def measured():
    chosen = (
        FLOOR,
        OURS,
        Implementation("slow", Slow),
        Implementation("wrong", Wrong),
        Implementation("broken", broken),
        Implementation("absent", broken, needs="no_such_package"),
    )
    named = choose(CELL, (), chosen)
    return measure(CELL, LayerSubject(CELL), named, seconds=0.0)


def test_measure_finds_a_slow_peer_slow(measured):
    by_name, _ = measured
    assert by_name["slow"]["median_ms"] > 50
    assert by_name["slow"]["ours_over_peer"][2] < 1.0
    assert not rows.lost(by_name["slow"])


def test_measure_of_a_package_as_slow_as_that_loses_the_cell():
    slow = Implementation("lora_kernels", Slow)
    fast = Implementation("formula", peers.Formula)
    by_name, _ = measure(CELL, LayerSubject(CELL), choose(CELL, (), (FLOOR, fast, slow)), 0.0)
    assert rows.lost(by_name["formula"])
    assert "cells: 0 won, 1 lost, 0 undecided" in report.terminal(list(complete(by_name)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wrong", "wrong: wrong scales x wrongly"),
        ("broken", "RuntimeError: out of everything"),
        ("absent", "no_such_package is not installed"),
    ],
)
def test_measure_skips_a_wrong_broken_or_absent_peer(measured, name, reason):
    by_name, samples = measured
    assert by_name[name]["skipped"] == reason
    assert name not in samples
    for field in ("p10_ms", "median_ms", "p90_ms", "over_frozen", "ours_over_peer"):
        assert by_name[name][field] is None
    text = report.terminal(list(complete(by_name)))
    assert f"  {name}: {reason} (1 cells)" in text
    _, table = text.split("ours/peer")
    assert name not in table


def complete(by_name):
    """Rows as a run leaves them, with the machine in them."""
    return ({**row, **CEILINGS} for row in by_name.values())


def test_measure_times_the_others_all_the_same(measured):
    by_name, samples = measured
    assert samples.keys() == {"frozen", "lora_kernels", "slow"}
    assert by_name["lora_kernels"]["median_ms"] > 0


@pytest.mark.filterwarnings("ignore:lora_kernels. algorithm fused:RuntimeWarning")
def test_measure_skips_an_algorithm_that_failed(monkeypatch):
    def run_without_fused(algorithm, what, compute):
        def compute_or_fail(name):
            if name == "fused":
                raise fallback.KernelError("ptxas fell over\nand more")
            return compute("reference")

        return run(algorithm, what, compute_or_fail)

    run = fallback.run
    monkeypatch.setattr(fallback, "run", run_without_fused)
    monkeypatch.setattr(fallback, "_failed", {})
    ours = [
        Implementation(f"lora_kernels[{name}]", implementations.ours, algorithm=name)
        for name in ("fused", "addmm")
    ]
    named = choose(CELL, (), (FLOOR, *ours))
    by_name, samples = measure(CELL, LayerSubject(CELL), named, seconds=0.0)
    fused = by_name["lora_kernels[fused]"]
    assert fused["skipped"] == "algorithm fused failed: ptxas fell over"
    assert fused["median_ms"] is None
    assert samples.keys() == {"frozen", "lora_kernels[addmm]"}


def test_measure_leaves_out_what_only_a_gpu_counts(measured):
    by_name, _ = measured
    assert by_name["lora_kernels"]["saved_bytes"] > 0
    assert by_name["lora_kernels"]["launches"] is by_name["lora_kernels"]["peak_bytes"] is None


def test_layer_subject_takes_a_module_that_trains_nothing_for_the_floor_alone():
    subject = LayerSubject(CELL)
    subject.check(FLOOR)
    with pytest.raises(AssertionError, match="nothing y"):
        subject.check(
            Implementation("nothing", lambda problem: nn.Linear(48, 40).requires_grad_(False))
        )


def stack(mode):
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    x, dy = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    return layers, x, dy, step(layers, x, dy, mode)


def test_step_forward_returns_each_output(seed):
    layers, x, _, timed = stack("forward")
    for y, layer in zip(timed.call(), layers, strict=True):
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", ["backward", "forward+backward"])
def test_step_with_backward_returns_the_gradients_in_reverse_and_accumulates_nothing(mode, seed):
    layers, x, dy, timed = stack(mode)
    expected = [
        grad
        for layer in reversed(layers)
        for grad in torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)
    ]
    for _ in range(2):
        timed.prepare()
        for actual, grad in zip(timed.call(), expected, strict=True):
            assert torch.equal(actual, grad)
    assert x.grad is layers[0].weight.grad is None


def test_step_backward_leaves_the_forward_out_of_the_call():
    layers, _, _, timed = stack("backward")
    forwards = []
    layers[0].register_forward_hook(lambda *_: forwards.append(1))
    timed.prepare()
    assert forwards == [1]
    timed.call()
    assert forwards == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_step_can_be_captured_and_draws_anew(mode):
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).cuda()
    x, dy = (torch.randn(32, 64, device="cuda") for _ in range(2))
    timed = step([module], x.requires_grad_(), dy, mode)
    replayed = stopwatch.capture(timed, draws=True)
    replayed.prepare()
    replayed.call()
