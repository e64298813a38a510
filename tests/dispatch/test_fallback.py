"""What happens if kernels do not compile or launch."""

import subprocess
import warnings

import pytest
import torch
from triton.runtime.errors import PTXASError

from lora_kernels.dispatch import fallback
from lora_kernels.testing.problem import make_problem
from tests.calls import call, solve


def broken(error):
    """A launch that ends in this error of Triton's, or of what Triton calls."""

    def launch(*args, **kwargs):
        with fallback.of_kernels():
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
        monkeypatch.setattr(
            "lora_kernels.kernels.expand.launch", broken(torch.OutOfMemoryError("not fused"))
        )
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
        broken(subprocess.CalledProcessError(1, "gcc"))()

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
        torch.OutOfMemoryError("out of memory"),
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


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("libcuda.so cannot found!"),
        TypeError("no argument"),
        KeyError("tt.dot"),
        PTXASError("error : Illegal modifier '.multicast' for instruction 'cp.async.bulk'"),
        subprocess.CalledProcessError(1, ["gcc", "-I/home/me/motion-capture/include"]),
        RuntimeError("failed to legalize operation 'tt.dot' that was explicitly marked illegal"),
    ],
    ids=str,
)
def test_any_error_of_a_launch_is_a_kernels(error, forgetful, monkeypatch, device):
    """Triton's own faults are of any type; another release may raise others."""
    import triton

    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    problem = make_problem(70, 8, 7, 2, device=device)
    expected = call(problem)

    def run(self, *args, **kwargs):
        raise error

    kind = triton.JITFunction if device.type == "cuda" else triton.runtime.interpreter
    kind = getattr(kind, "InterpretedFunction", kind)
    monkeypatch.setattr(kind, "run", run)
    with pytest.warns(RuntimeWarning, match=type(error).__name__):
        torch.testing.assert_close(call(problem), expected)


@pytest.mark.parametrize(
    "text",
    [
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2.",
        "CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx",
        "a bug",
    ],
)
def test_errors_of_torchs_operators_are_raised_and_not_counted(
    text, forgetful, monkeypatch, device
):
    from lora_kernels.kernels import linear

    def output(*args):
        raise RuntimeError(text)

    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    monkeypatch.setattr(linear, "output", output)
    with pytest.raises(RuntimeError) as caught:
        call(make_problem(70, 8, 7, 2, device=device))
    assert str(caught.value) == text
    assert not fallback.failures()


@pytest.mark.parametrize(
    "changes", [{"r": 20}, {"dropout_p": 0.0}, {"m": 60}, {"dtype": torch.float16}], ids=str
)
def test_layers_of_another_class_still_take_the_kernels(changes, forgetful, monkeypatch, device):
    from lora_kernels.kernels import shrink

    monkeypatch.setenv("LORA_KERNELS_PLAN", "addmm")
    failing = {"m": 70, "k": 24, "n": 8, "r": 2, "dropout_p": 0.3, "device": device}
    monkeypatch.setattr(shrink, "launch", broken(RuntimeError("PassManager::run failed")))
    with pytest.warns(RuntimeWarning, match="PassManager"):
        call(make_problem(**failing))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(make_problem(**failing | {"m": 75}))  # of the same class
        with pytest.raises(RuntimeWarning, match="PassManager"):
            call(make_problem(**failing | changes))
