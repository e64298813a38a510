"""Which algorithm a product takes and why, read off a table or not."""

import warnings
from dataclasses import replace

import pytest
import torch

from lora_kernels.dispatch import algorithm as algorithms
from lora_kernels.dispatch.algorithm import Algorithm, choose
from lora_kernels.dispatch.table import GemmShape, TuningEntry
from lora_kernels.testing.problem import make_problem
from tests.calls import call

GPU = torch.cuda.is_available()
H200 = torch.device("cuda", 0)


def shape(**changes):
    values = {"m": 8192, "n": 4096, "k": 4096, "r": 16, "dtype": torch.bfloat16, "device": H200}
    return GemmShape(**{**values, **changes})


@pytest.fixture
def h200(monkeypatch):
    """A process that has an H200, as far as the choice of an algorithm can see, and no wish."""
    algorithms.machine_obstacle.cache_clear()
    monkeypatch.setattr(algorithms, "capability_of", lambda device: (9, 0))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS, indirect=True)
def test_the_variable_decides(h200, algorithm, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", algorithm)
    assert choose(shape()) == Algorithm(algorithm, f"LORA_KERNELS_PLAN={algorithm}")


@pytest.mark.parametrize("value", ["", "Fused", "fastest"])
def test_another_value_is_named(value, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", value)
    with pytest.raises(ValueError, match=f"LORA_KERNELS_PLAN .*reference.* got '{value}'"):
        choose(shape())
    with pytest.raises(ValueError, match="LORA_KERNELS_PLAN"):
        call(make_problem(2, 3, 4, 1, device="cpu"))


def test_without_a_measurement_cublas_takes_the_large_shape(h200):
    assert choose(shape()).name == "addmm"
    assert "(9, 0)" in choose(shape()).reason


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"m": 64}, "fused"),
        ({"m": 65}, "addmm"),
        ({"m": 16, "dropout": True, "r": 32}, "fused"),
        ({"m": 17, "dropout": True}, "addmm"),
        ({"m": 1, "r": 33}, "addmm"),
        ({"m": 1, "backward": True}, "addmm"),
        ({"m": 1, "dtype": torch.float32}, "addmm"),
        ({"m": 1, "uniform": False}, "addmm"),
    ],
    ids=str,
)
def test_choose_without_a_measurement_has_the_fewest_launches_for_a_small_m(
    h200, changes, name, monkeypatch
):
    assert choose(shape(**changes)).name == name
    monkeypatch.setattr(
        algorithms, "TABLE", (replace(ROW, algorithm="addmm", m=(1, 64), k=(4096, 4096)),)
    )
    assert choose(shape(**changes, k=4096)).name == "addmm"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 0}, "empty"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": torch.device("cpu")}, "on a CPU"),
        ({"device": torch.device("meta")}, "meta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", ["auto", "fused"])
def test_what_the_kernels_do_not_take(h200, asked, changes, reason, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = choose(shape(**changes))
    assert chosen.name == "reference"
    assert reason in chosen.reason


def test_cpu_tensors_reach_the_kernels_in_the_interpreter(h200, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(shape(device=torch.device("cpu"))) == Algorithm("fused", "TRITON_INTERPRET=1")


def test_without_triton(h200, monkeypatch):
    monkeypatch.setattr(algorithms, "_has_triton", lambda: False)
    algorithms.machine_obstacle.cache_clear()
    assert choose(shape()) == Algorithm("reference", "triton 3.4 or newer is not installed")
    algorithms.machine_obstacle.cache_clear()


def test_float32_of_a_small_m_takes_one_launch_if_tf32_is_allowed(h200, monkeypatch):
    monkeypatch.setattr(algorithms, "tf32_allowed", lambda: True)
    assert choose(shape(m=1, dtype=torch.float32)).name == "fused"


@pytest.fixture
def machine(monkeypatch):
    """Sets the capability and the version of Triton that the choice sees."""

    def become(capability, triton="3.9.0"):
        monkeypatch.setattr(algorithms, "capability_of", lambda device: capability)
        monkeypatch.setattr("triton.__version__", triton)
        algorithms.machine_obstacle.cache_clear()

    yield become
    algorithms.machine_obstacle.cache_clear()
    algorithms._said.clear()


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), "3.9.0", "(7, 5), below 8.0"),
        ((6, 1), "3.9.0", "matrix instructions"),
        ((8, 0), "3.4.0", None),
        ((9, 0), "3.6.0", None),
        ((10, 0), "3.6.0", "3.7.1 or newer"),
        ((10, 3), "3.7.0", "fences"),
        ((12, 0), "3.7.0+git1", "fences"),
        ((10, 0), "3.7.1", None),
        ((12, 0), "3.10.0+git1", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", ["auto", "fused"])
def test_gpus_on_which_kernels_would_be_slow_or_wrong_take_the_reference(
    asked, capability, triton, reason, machine, monkeypatch
):
    monkeypatch.setenv("LORA_KERNELS_PLAN", asked)
    machine(capability, triton)
    chosen = choose(shape())
    assert (chosen.name == "reference") == (reason is not None)
    if reason is not None:
        assert reason in chosen.reason


def test_a_gpu_without_kernels_is_named_once(machine, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    machine((7, 5))
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch computes on cuda:0: .*below 8\.0"):
        algorithms.warn_of_machine(H200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithms.warn_of_machine(H200)
        algorithms.warn_of_machine(torch.device("cpu"))
        machine((9, 0))
        algorithms.warn_of_machine(H200)


ROW = TuningEntry(
    (9, 0), torch.bfloat16, "fused", "a.json", m=(512, 1e9), k=(2048, 4096), r=(1, 64)
)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fused"),
        ({"m": 512, "k": 2048, "r": 64, "dropout": True}, "fused"),
        ({"m": 511}, "addmm"),
        ({"k": 4097}, "addmm"),
        ({"r": 65}, "addmm"),
        ({"dtype": torch.float16}, "addmm"),
        ({"tma": False}, "addmm"),
    ],
    ids=str,
)
def test_the_first_row_of_the_table_that_holds_decides(h200, changes, name, monkeypatch):
    monkeypatch.setattr(algorithms, "TABLE", (ROW,))
    assert choose(shape(**changes)).name == name
    monkeypatch.setattr(algorithms, "capability_of", lambda device: (8, 0))
    assert choose(shape(**changes)).name == "addmm"


def test_a_row_names_its_source_and_may_ask_for_dropout(h200, monkeypatch):
    row = TuningEntry((9, 0), torch.bfloat16, "fused", "a.json", dropout=False)
    monkeypatch.setattr(algorithms, "TABLE", (row, ROW))
    assert choose(shape()) == Algorithm("fused", "measured: a.json")
    monkeypatch.setattr(algorithms, "TABLE", (row,))
    assert choose(shape(dropout=True)).name == "addmm"


def test_forward_and_backward_are_measured_each_by_itself(h200, monkeypatch):
    row = TuningEntry((9, 0), torch.bfloat16, "fused", "a.json", backward=False)
    for table, names in (
        ((row,), ("fused", "addmm")),
        ((replace(row, backward=True),), ("addmm", "fused")),
        ((replace(row, backward=None),), ("fused", "fused")),
    ):
        monkeypatch.setattr(algorithms, "TABLE", table)
        passes = shape(), shape(backward=True)
        assert tuple(choose(one).name for one in passes) == names


def test_sandwich_is_the_former_name_of_addmm(h200, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", "sandwich")
    with pytest.warns(FutureWarning, match="LORA_KERNELS_PLAN=addmm"):
        assert choose(shape()) == Algorithm("addmm", "LORA_KERNELS_PLAN=addmm")


def test_the_interpreter_outside_of_tests_is_told_once(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(algorithms, "_said", set())
    asked = shape(device=torch.device("cpu"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(asked)  # in a test
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.warns(RuntimeWarning, match="Triton's interpreter, which is for tests"):
        choose(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(asked)
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "back")
