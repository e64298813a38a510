"""What happens if kernels do not compile or launch."""

import subprocess
import warnings

import pytest
import torch

from lora_kernels.dispatch import fallback
from lora_kernels.testing.problem import make_problem
from tests.calls import call, solve


def broken(error):
    def launch(*args, **kwargs):
        raise error

    return launch


@pytest.fixture
def forgetful():
    """No algorithm has failed yet."""
    fallback._failed.clear()
    yield
    fallback._failed.clear()


def test_a_kernel_that_does_not_compile_is_named_once_and_the_result_is_right(
    forgetful, monkeypatch, device
):
    from triton.runtime.errors import OutOfResources

    from lora_kernels.kernels import gemm_bwd, gemm_fwd

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    problem = make_problem(70, 8, 7, 2, device=device, dropout_p=0.3)
    expected = solve(problem)
    error = OutOfResources(300000, 232448, "shared memory")
    monkeypatch.setattr(gemm_fwd, "launch", broken(error))
    monkeypatch.setattr(gemm_bwd, "launch", broken(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            results = solve(problem)
    ours = [str(w.message) for w in caught if "lora_kernels" in str(w.message)]
    assert len(ours) == 2  # the forward and the backward
    assert "algorithm fused failed for lora_linear_forward" in ours[0]
    assert "addmm takes its place: OutOfResources" in ours[0]
    assert "300000" in ours[0]
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], msg=name)


def test_a_small_m_fails_alone(forgetful, monkeypatch, device):
    from lora_kernels.kernels import gemm_small_m

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    few, many = (make_problem(m, 8, 7, 2, device=device) for m in (9, 70))
    expected = call(few)
    monkeypatch.setattr(gemm_small_m, "launch", broken(RuntimeError("PassManager::run failed")))
    with pytest.warns(RuntimeWarning, match="fused failed for lora_linear_forward small m"):
        torch.testing.assert_close(call(few), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(few)
        monkeypatch.setattr("lora_kernels.kernels.expand.launch", broken(KeyError("not fused")))
        call(many)


def test_where_both_plans_fail_the_reference_computes(forgetful, monkeypatch, device):
    from lora_kernels.kernels import grad_b, shrink

    problem = make_problem(70, 8, 7, 2, device=device)
    monkeypatch.setenv("LORA_KERNELS_PLAN", "reference")
    expected = solve(problem)
    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    for module in (shrink, grad_b):
        monkeypatch.setattr(module, "launch", broken(RuntimeError("PassManager::run failed")))
    with pytest.warns(RuntimeWarning, match="PassManager"):
        results = solve(problem)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_a_plan_that_failed_is_not_tried_again(forgetful, monkeypatch, device):
    from lora_kernels.kernels import shrink

    tried = []

    def launch(*args, **kwargs):
        tried.append(args)
        raise subprocess.CalledProcessError(1, "gcc")

    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    monkeypatch.setattr(shrink, "launch", launch)
    problem = make_problem(70, 8, 7, 2, device=device)
    with pytest.warns(RuntimeWarning, match="gcc"):
        call(problem)
    call(problem)
    assert len(tried) == 1
    [((name, what), reason)] = fallback.failures().items()
    assert name == "addmm"
    assert problem.x.dtype in what
    assert "gcc" in reason


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"), ValueError("a bug"), KeyError("a bug"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=str,
)  # fmt: skip
def test_other_errors_are_raised(error, monkeypatch, device):
    from lora_kernels.kernels import shrink

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    monkeypatch.setattr(shrink, "launch", broken(error))
    with pytest.raises(type(error)):
        call(make_problem(70, 8, 7, 2, device=device))
