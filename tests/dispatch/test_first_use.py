"""LORA_KERNELS_TUNE=first-use: the first call decides, and only where nothing else has."""

import warnings

import pytest
import torch

from lora_kernels.dispatch import fallback, first_use, measured
from lora_kernels.dispatch.algorithm import choose
from lora_kernels.dispatch.table import GemmShape
from lora_kernels.kernels import linear
from lora_kernels.testing.problem import make_problem
from tests.calls import call, solve

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls on the CPU")


@pytest.fixture
def asked(cache, monkeypatch):
    monkeypatch.setattr(fallback, "_failed", {})
    monkeypatch.setenv("LORA_KERNELS_TUNE", "first-use")
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")


@pytest.fixture
def calls(monkeypatch):
    """The algorithms of all forwards. By the clock, fused takes longer in either pass."""
    seen, last = [], []
    for function, lists in (
        ("lora_linear_forward", (seen, last)),
        ("lora_linear_backward", (last,)),
    ):
        original = getattr(linear, function)

        def noted(algorithm, *operands, original=original, lists=lists):
            for names in lists:
                names.append(algorithm)
            return original(algorithm, *operands)

        monkeypatch.setattr(linear, function, noted)

    def seconds(call, device) -> float:
        call()
        return 2.0 if last[-1] == "fused" else 1.0

    monkeypatch.setattr(first_use, "_seconds", seconds)
    monkeypatch.setattr(first_use, "_ROUNDS", 2)
    monkeypatch.setattr(first_use, "_WARM_UP", 1)
    return seen


@needs_no_gpu
def test_the_first_call_decides_for_all_of_its_shape(asked, calls, device, seed):
    problem = make_problem(70, 8, 7, 2, device=device, dropout_p=0.3)
    results = solve(problem)
    assert {"fused", "addmm"} == set(calls)
    assert calls[-1] == "addmm"  # a slow plan is not chosen
    first = len(calls)
    again = solve(problem)
    assert calls[first:] == ["addmm"]
    for name, result in results.items():
        assert torch.equal(result, again[name]), name
    shape = GemmShape(100, 7, 8, 2, torch.float32, device, dropout=True)
    assert choose(shape).reason == "measured on this GPU"
    assert choose(shape._replace(m=128)).reason == "TRITON_INTERPRET=1"  # another power of two
    measured.forget()
    assert choose(shape).name == "addmm"  # out of the file


@needs_no_gpu
def test_a_product_that_was_measured_is_not_measured_again(asked, calls, device):
    problem = make_problem(70, 8, 7, 2, device=device)
    solve(problem)
    measured.forget()  # a new process
    calls.clear()
    solve(problem)
    assert calls == ["addmm"]


@needs_no_gpu
@pytest.mark.parametrize(("m", "dropout_p", "other"), [(16, 0.3, 17), (17, 0.3, 16), (64, 0.0, 65)])
def test_few_rows_say_nothing_of_more(m, dropout_p, other, asked, calls, device):
    """One kernel makes h and y of few rows; more of them run others, or the other way round."""
    solve(make_problem(m, 8, 7, 2, device=device, dropout_p=dropout_p))
    shape = GemmShape(m, 7, 8, 2, torch.float32, device, dropout=dropout_p > 0)
    assert choose(shape).reason == "measured on this GPU"
    assert choose(shape._replace(m=other)).reason == "TRITON_INTERPRET=1"
    backward = shape._replace(backward=True)
    if m.bit_length() == other.bit_length():
        assert choose(backward._replace(m=other)).reason == "measured on this GPU"


@needs_no_gpu
def test_a_backward_without_dx_decides_nothing(asked, calls, device):
    """As of a model's first layer: the algorithms launch the same kernels there."""
    p = make_problem(70, 8, 7, 2, device=device)
    leaves = [p.a.requires_grad_(), p.b.requires_grad_()]
    backward = GemmShape(70, 7, 8, 2, torch.float32, device, backward=True)
    torch.autograd.grad(call(p).sum(), leaves)
    assert choose(backward).reason == "TRITON_INTERPRET=1"
    torch.autograd.grad(call(p, x=p.x.requires_grad_()).sum(), [*leaves, p.x])
    assert choose(backward).reason == "measured on this GPU"


@needs_no_gpu
def test_the_wish_of_the_user_goes_before_it(asked, calls, device, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    solve(make_problem(70, 8, 7, 2, device=device))
    assert calls == ["fused"]


def said_while_failing(failing, device, monkeypatch) -> list[str]:
    """The warnings of two calls whose forward fails by these algorithms; results are right."""
    forward = linear.lora_linear_forward

    def broken(algorithm, *operands):
        if algorithm in failing:
            raise fallback.KernelError(f"RuntimeError: no {algorithm}")
        return forward(algorithm, *operands)

    problem = make_problem(70, 8, 7, 2, device=device)
    expected = solve(problem)
    measured.clear(device)
    monkeypatch.setattr(linear, "lora_linear_forward", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = solve(problem)
        solve(problem)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], msg=name)
    return [str(w.message) for w in caught if str(w.message).startswith("lora_kernels")]


@needs_no_gpu
def test_an_algorithm_that_fails_leaves_the_other(asked, device, monkeypatch):
    said = said_while_failing(["fused"], device, monkeypatch)
    assert len(said) == 1
    assert "fused failed for lora_linear_forward" in said[0]
    assert "and addmm takes its place: RuntimeError: no fused" in said[0]
    assert choose(GemmShape(70, 7, 8, 2, torch.float32, device)).name == "addmm"


@needs_no_gpu
def test_if_both_fail_nothing_is_kept(asked, device, monkeypatch):
    said = said_while_failing(["fused", "addmm"], device, monkeypatch)
    assert len(said) == 2
    assert "no fused" in said[0]
    assert "no addmm" in said[1]
    measured.forget()
    assert choose(GemmShape(70, 7, 8, 2, torch.float32, device)).reason == "TRITON_INTERPRET=1"


@needs_no_gpu
def test_running_out_of_memory_is_raised(asked, device, monkeypatch):
    def full(*operands):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear, "lora_linear_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        solve(make_problem(70, 8, 7, 2, device=device))


@needs_no_gpu
def test_a_directory_that_cannot_be_written_stops_nothing(asked, device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(make_problem(70, 8, 7, 2, device=device))
    assert any("stays in this process" in str(w.message) for w in caught)


def test_another_value_is_named(monkeypatch, device):
    monkeypatch.setenv("LORA_KERNELS_TUNE", "always")
    with pytest.raises(ValueError, match="LORA_KERNELS_TUNE must be 0 or first-use, got 'always'"):
        first_use.is_asked(device)


def test_unasked_it_does_nothing(monkeypatch, device):
    monkeypatch.delenv("LORA_KERNELS_TUNE", raising=False)
    assert not first_use.is_asked(device)
    monkeypatch.setenv("LORA_KERNELS_TUNE", "0")
    assert not first_use.is_asked(device)
