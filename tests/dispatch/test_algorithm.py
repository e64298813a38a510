"""Which plan a product takes and why, and what happens where its kernels fail."""

import subprocess
import warnings
from dataclasses import replace

import pytest
import torch

import lora_kernels
from lora_kernels import plan as plans
from lora_kernels.plan import Measured, Plan, Product, choose
from tests.calls import call, solve
from lora_kernels.testing.problem import make_problem

GPU = torch.cuda.is_available()
H200 = torch.device("cuda", 0)


def product(**changes):
    values = {"m": 8192, "n": 4096, "k": 4096, "r": 16, "dtype": torch.bfloat16, "device": H200}
    return Product(**{**values, **changes})


@pytest.fixture
def h200(monkeypatch):
    """A process that has an H200, as far as the choice of a plan can see, and no wish."""
    monkeypatch.setattr(plans, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")


@pytest.mark.parametrize("plan", plans.PLANS, indirect=True)
def test_the_variable_decides(h200, plan, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", plan)
    assert choose(product()) == Plan(plan, f"LORA_KERNELS_PLAN={plan}")


@pytest.mark.parametrize("value", ["", "Fused", "fastest"])
def test_another_value_is_named(value, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", value)
    with pytest.raises(ValueError, match=f"LORA_KERNELS_PLAN .*reference.* got '{value}'"):
        choose(product())
    with pytest.raises(ValueError, match="LORA_KERNELS_PLAN"):
        call(make_problem(2, 3, 4, 1, device="cpu"))


def test_without_a_measurement_cublas_takes_the_large_product(h200):
    assert choose(product()).name == "sandwich"
    assert "(9, 0)" in choose(product()).reason


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"m": 64}, "fused"),
        ({"m": 65}, "sandwich"),
        ({"m": 16, "dropout": True, "r": 32}, "fused"),
        ({"m": 17, "dropout": True}, "sandwich"),
        ({"m": 1, "r": 33}, "sandwich"),
        ({"m": 1, "backward": True}, "sandwich"),
    ],
    ids=str,
)
def test_without_a_measurement_few_rows_take_the_fewest_launches(h200, changes, name, monkeypatch):
    assert choose(product(**changes)).name == name
    monkeypatch.setattr(plans, "TABLE", (replace(ROW, plan="sandwich", m=(1, 64), k=(4096, 4096)),))
    assert choose(product(**changes, k=4096)).name == "sandwich"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 0}, "empty"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": torch.device("cpu")}, "TRITON_INTERPRET"),
        ({"device": torch.device("meta")}, "meta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", ["auto", "fused"])
def test_what_the_kernels_do_not_take(h200, asked, changes, reason, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = choose(product(**changes))
    assert chosen.name == "reference"
    assert reason in chosen.reason


def test_cpu_tensors_reach_the_kernels_in_the_interpreter(h200, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(product(device=torch.device("cpu"))) == Plan("fused", "TRITON_INTERPRET=1")


def test_without_triton(h200, monkeypatch):
    monkeypatch.setattr(plans, "_has_triton", lambda: False)
    assert choose(product()) == Plan("reference", "triton 3.4 or newer is not installed")


ROW = Measured((9, 0), torch.bfloat16, "fused", "a.json", m=(512, 1e9), k=(2048, 4096), r=(1, 64))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fused"),
        ({"m": 512, "k": 2048, "r": 64, "dropout": True}, "fused"),
        ({"m": 511}, "sandwich"),
        ({"k": 4097}, "sandwich"),
        ({"r": 65}, "sandwich"),
        ({"dtype": torch.float16}, "sandwich"),
        ({"aligned": False}, "sandwich"),
    ],
    ids=str,
)
def test_the_first_row_of_the_table_that_holds_decides(h200, changes, name, monkeypatch):
    monkeypatch.setattr(plans, "TABLE", (ROW,))
    assert choose(product(**changes)).name == name
    monkeypatch.setattr(plans, "capability_of", lambda device: (8, 0))
    assert choose(product(**changes)).name == "sandwich"


def test_a_row_names_its_source_and_may_ask_for_dropout(h200, monkeypatch):
    row = Measured((9, 0), torch.bfloat16, "fused", "a.json", dropout=False)
    monkeypatch.setattr(plans, "TABLE", (row, ROW))
    assert choose(product()) == Plan("fused", "measured: a.json")
    monkeypatch.setattr(plans, "TABLE", (row,))
    assert choose(product(dropout=True)).name == "sandwich"


def test_forward_and_backward_are_measured_each_by_itself(h200, monkeypatch):
    row = Measured((9, 0), torch.bfloat16, "fused", "a.json", backward=False)
    for table, names in (
        ((row,), ("fused", "sandwich")),
        ((replace(row, backward=True),), ("sandwich", "fused")),
        ((replace(row, backward=None),), ("fused", "fused")),
    ):
        monkeypatch.setattr(plans, "TABLE", table)
        passes = product(), product(backward=True)
        assert tuple(choose(one).name for one in passes) == names


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w, True),
        (lambda w: w.T, True),
        (lambda w: w[:, 8:], True),
        (lambda w: w[:, 1:], False),
        (lambda w: w[:, ::2], False),
        (lambda w: torch.zeros(7, 9, dtype=torch.float16), False),
    ],
)
def test_aligned(change, expected):
    assert plans.aligned(None, change(torch.zeros(32, 64, dtype=torch.float16))) == expected


def broken(error):
    def launch(*args, **kwargs):
        raise error

    return launch


@pytest.fixture
def forgetful():
    """No plan has failed yet."""
    plans._failed.clear()
    yield
    plans._failed.clear()


def test_a_kernel_that_does_not_compile_is_named_once_and_the_result_is_right(
    forgetful, monkeypatch, device
):
    from triton.runtime.errors import OutOfResources

    from lora_kernels.kernels import dx, forward

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    problem = make_problem(70, 8, 7, 2, device=device, dropout_p=0.3)
    expected = solve(problem)
    error = OutOfResources(300000, 232448, "shared memory")
    monkeypatch.setattr(forward, "launch", broken(error))
    monkeypatch.setattr(dx, "launch", broken(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            results = solve(problem)
    ours = [str(w.message) for w in caught if "lora_kernels" in str(w.message)]
    assert len(ours) == 2  # the forward and the backward
    assert "plan fused failed for lora_linear_forward" in ours[0]
    assert "sandwich takes its place: OutOfResources" in ours[0]
    assert "300000" in ours[0]
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], msg=name)


def test_few_rows_fail_alone(forgetful, monkeypatch, device):
    from lora_kernels.kernels import few_rows

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    few, many = (make_problem(m, 8, 7, 2, device=device) for m in (9, 70))
    expected = call(few)
    monkeypatch.setattr(few_rows, "launch", broken(RuntimeError("PassManager::run failed")))
    with pytest.warns(RuntimeWarning, match="fused failed for lora_linear_forward few rows"):
        torch.testing.assert_close(call(few), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(few)
        monkeypatch.setattr("lora_kernels.kernels.fill.launch", broken(KeyError("not fused")))
        call(many)


def test_where_both_plans_fail_the_reference_computes(forgetful, monkeypatch, device):
    from lora_kernels.kernels import down, dy_pass

    problem = make_problem(70, 8, 7, 2, device=device)
    monkeypatch.setenv("LORA_KERNELS_PLAN", "reference")
    expected = solve(problem)
    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    for module in (down, dy_pass):
        monkeypatch.setattr(module, "launch", broken(RuntimeError("PassManager::run failed")))
    with pytest.warns(RuntimeWarning, match="PassManager"):
        results = solve(problem)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_a_plan_that_failed_is_not_tried_again(forgetful, monkeypatch, device):
    from lora_kernels.kernels import down

    tried = []

    def launch(*args, **kwargs):
        tried.append(args)
        raise subprocess.CalledProcessError(1, "gcc")

    monkeypatch.setenv("LORA_KERNELS_PLAN", "sandwich")
    monkeypatch.setattr(down, "launch", launch)
    problem = make_problem(70, 8, 7, 2, device=device)
    with pytest.warns(RuntimeWarning, match="gcc"):
        call(problem)
    call(problem)
    assert len(tried) == 1
    [((name, what), reason)] = plans.failures().items()
    assert name == "sandwich"
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
    from lora_kernels.kernels import down

    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    monkeypatch.setattr(down, "launch", broken(error))
    with pytest.raises(type(error)):
        call(make_problem(70, 8, 7, 2, device=device))


@pytest.fixture
def seen(monkeypatch):
    """The ops that reach the kernels, and the plan that each is run by."""
    from lora_kernels.kernels import linear, shared_linear

    calls = []
    for module in (linear, shared_linear):
        for name in module.__all__:
            if name.startswith("lora_"):
                real = getattr(module, name)

                def call(plan, *args, name=name, real=real):
                    calls.append((name, plan))
                    return real(plan, *args)

                monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("plan", ["fused", "sandwich", "reference"], indirect=True)
def test_layers_take_the_plan_that_is_chosen(plan, seen, device):
    layer = lora_kernels.Linear(8, 6, r=2, device=device)
    layer(torch.randn(3, 8, device=device)).sum().backward()
    assert [name for _, name in seen] == ([] if plan == "reference" else [plan, plan])


@pytest.mark.parametrize("shared", [False, True])
def test_each_pass_asks_for_its_own_plan(shared, seen, monkeypatch, device):
    monkeypatch.setattr(
        plans, "choose", lambda product: Plan("sandwich" if product.backward else "fused", "")
    )
    x, w, a, b = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((3, 8), (6, 8), (2, 8), (6, 2))
    )
    if shared:
        (y,) = lora_kernels.lora_shared_linear(x, [w.detach()], [a], [b])
    else:
        y = lora_kernels.lora_linear(x, w.detach(), a, b)
    y.sum().backward()
    op = "lora_shared_linear" if shared else "lora_linear"
    assert seen == [(f"{op}_forward", "fused"), (f"{op}_backward", "sandwich")]
