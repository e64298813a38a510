"""Which kernels are checked before an op runs: those that it launches, and no others."""

import importlib

import pytest
import torch

import lora_kernels
from lora_kernels import lora_grouped_linear, lora_shared_linear
from lora_kernels.kernels.registry import KERNELS, kernel_of
from lora_kernels.ops import first_call, library
from lora_kernels.testing.dora_problem import make_dora_problem
from lora_kernels.testing.grouped_problem import make_grouped_problem
from lora_kernels.testing.problem import make_problem
from tests.calls import solve

OF_OTHERS = {"split_k_reduce", "grouped_reduce"}  # launched by launchers of other kernels
NAMES = {kernel.function: name for name, kernel in KERNELS.items()}


@pytest.fixture
def launched(monkeypatch):
    """By op and algorithm, the kernels that it has launched."""
    found, current = {}, []

    def prepare(function, algorithm, shape, operands):
        current[:] = [(function.__name__, algorithm)]
        found.setdefault(current[0], set())

    monkeypatch.setattr(library.first_call, "prepare", prepare)
    for name in KERNELS:
        module = importlib.import_module(f"lora_kernels.kernels.{name}")

        def launch(function, grid, original=module.launch, **arguments):
            found[current[0]].add(NAMES[function])
            original(function, grid, **arguments)

        monkeypatch.setattr(module, "launch", launch)
    return found


def linear(device):
    for m in (9, 70):
        for p in (0.0, 0.3):
            solve(make_problem(m, 24, 20, 4, device=device, dropout_p=p))
    frozen = make_problem(70, 24, 20, 4, device=device)
    frozen.x.requires_grad_()
    lora_kernels.lora_linear(frozen.x, frozen.w, frozen.a, frozen.b).sum().backward()
    solve(make_problem(70, 24, 20, 80, device=device))  # too high a rank for expand_grad_a


def shared(device):
    p, q = (make_problem(70, 24, n, 4, device=device) for n in (20, 16))
    leaves = [t.requires_grad_() for t in (p.x, p.a, p.b, q.a, q.b)]
    x, a, b, c, d = leaves
    ys = lora_shared_linear(x, [p.w, q.w], [a, c], [b, d], [None, None], dropout_p=0.3)
    torch.autograd.grad(sum(y.sum() for y in ys), leaves)


def grouped(device):
    for experts in (None, 2):
        p = make_grouped_problem(
            (9, 20, 5, 12), 24, 20, 4, device=device, experts=experts, sources=60
        )
        leaves = [t.requires_grad_() for t in (p.x, p.a, p.b)]
        y = lora_grouped_linear(p.x, p.w, p.a, p.b, p.ends, groups=p.groups, index=p.index)
        torch.autograd.grad(y.sum(), leaves)


def dora(device):
    for m in (9, 70):
        for p in (0.0, 0.3):
            solve(make_dora_problem(m, 24, 20, 4, device=device, dropout_p=p))
    p = make_dora_problem(70, 24, 20, 4, device=device, dropout_p=0.3)
    p.w.requires_grad_()
    solve(p)


def quantised(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to(device)
    p = make_problem(70, 64, 32, 4, device=device)
    leaves = [t.requires_grad_() for t in (p.x, p.a, p.b)]
    y = lora_kernels.lora_linear(p.x, lora_kernels.frozen_weight(layer), p.a, p.b)
    torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
def test_the_launchers_of_each_op_are_those_that_it_launches(algorithm, launched, device, seed):
    for run in (linear, shared, grouped, dora, quantised):
        run(device)
    assert {op for op, _ in launched} == set(first_call.LAUNCHERS)
    for (op, name), kernels in launched.items():
        listed = {kernel_of(launcher).name for launcher in first_call.LAUNCHERS[op][name]}
        assert kernels - OF_OTHERS <= listed, op
        # What is listed and not launched here needs another GPU, or other operands.
        assert listed - kernels <= {"grouped_gemm", "expand_grad_a", "expand"}, op


def test_a_kind_is_prepared_once(monkeypatch, device):
    from lora_kernels.kernels import selfcheck

    checked = []
    monkeypatch.setattr(first_call, "_prepared", set())
    monkeypatch.setattr(selfcheck, "first_use", lambda variants, device: checked.append(variants))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    p = make_problem(70, 24, 20, 4, device=device, dropout_p=0.3)
    for _ in range(2):
        lora_kernels.lora_linear(p.x, p.w, p.a, p.b)
    ((shrink, expand),) = checked
    assert (shrink.launcher, expand.launcher) == ("shrink", "expand_y")
    assert shrink[1:] == (*[torch.float32] * 2, 4, False, 0, True, False, False, (True,))
    lora_kernels.lora_linear(p.x[:9], p.w, p.a, p.b)
    assert checked[1][0].small_m == 16
    lora_kernels.lora_linear(p.x, p.w.T.contiguous().T, p.a, p.b)
    assert checked[2][0].transposed
    lora_kernels.lora_linear(p.x[:, 1:], p.w[:, 1:], p.a[:, 1:], p.b)
    assert not checked[3][0].aligned
    lora_kernels.lora_linear(p.x, p.w, p.a, p.b, dropout_p=0.3)
    assert checked[4][0].dropout
    lora_kernels.lora_linear(p.x, p.w, p.a[:2], p.b[:, :2])
    assert checked[5][0].r == 2
    half = [t.half() for t in (p.x, p.w)]
    lora_kernels.lora_linear(*half, p.a, p.b)
    assert checked[6][0].dtypes == "float16/float32"
    assert not checked[6][0].narrow
    with torch.autocast(device.type, torch.float16):
        lora_kernels.lora_linear(*half, p.a, p.b)
        lora_kernels.lora_linear(*half, p.a.half(), p.b.half())
    assert checked[7][0].dtypes == "float16/float32"
    assert checked[7][0].narrow
    assert not checked[8][0].narrow  # there is nothing to round
    assert len(checked) == 9


@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
def test_factors_under_autocast_are_checked_in_the_numerics_that_run(
    algorithm, monkeypatch, device, cache, seed
):
    from lora_kernels.kernels import selfcheck, shrink

    kinds = []

    def launch(function, grid, original=shrink.launch, **arguments):
        kinds.append((arguments["x"].ptr.dtype, arguments["a"].ptr.dtype, arguments["NUMERICS"]))
        original(function, grid, **arguments)

    monkeypatch.setattr(shrink, "launch", launch)
    monkeypatch.setattr(first_call, "_prepared", set())
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setenv("LORA_KERNELS_CHECK", "1")
    p = make_problem(70, 24, 20, 4, device=device, dtype=torch.float16, lora_dtype=torch.float32)
    with torch.autocast(device.type, torch.float16):
        lora_kernels.lora_linear(p.x, p.w, p.a, p.b)
    assert len(kinds) == 3  # two of the check
    assert len(set(kinds)) == 1
