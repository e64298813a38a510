"""Environment variables with a value that they do not take: one line says so when they are read."""

import warnings

import pytest
import torch

import lora_kernels
from lora_kernels import environment
from lora_kernels.dispatch import cache as caches
from lora_kernels.integrations.peft.census import Census
from lora_kernels.kernels import records, selfcheck
from lora_kernels.ops import first_call
from lora_kernels.testing.problem import make_problem
from tests.calls import solve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_said():
    environment.warn_once.cache_clear()
    yield
    environment.warn_once.cache_clear()


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "LORA_KERNELS_" in str(each.message)]


def check(monkeypatch, device):
    """An op whose kernels are new to the process; those are not launched to check them."""
    monkeypatch.setattr(first_call, "_prepared", set())
    monkeypatch.setattr(selfcheck, "first_use", lambda variants, device: None)
    problem = make_problem(9, 24, 20, 4, device=device)

    def call():
        for _ in range(2):
            first_call._prepared.clear()
            records.forget()
            solve(problem)

    return call


def census(monkeypatch, device):
    return lambda: Census(lambda layer: None).forget()


USES = {
    "LORA_KERNELS_CHECK": (check, "unset"),
    "LORA_KERNELS_QUIET": (census, "1"),
    "LORA_KERNELS_REPORT": (census, "1"),
}


@pytest.mark.parametrize("algorithm", ["fused"], indirect=True)
@pytest.mark.parametrize(("name", "use", "taken"), [(n, *u) for n, u in USES.items()], ids=USES)
def test_another_value_is_said_once_with_what_the_variable_takes(
    algorithm, name, use, taken, monkeypatch, device
):
    call = use(monkeypatch, device)
    for other in USES:
        monkeypatch.delenv(other, raising=False)
    for value in (None, "", "0", "1"):
        if value is not None:
            monkeypatch.setenv(name, value)
        assert said(call) == []
    for value in ("yes", "false", "01", " 1"):
        monkeypatch.setenv(name, value)
        expected = f"{name} must be 0 or 1, got {value!r}: it is taken for {taken}"
        assert said(call) == [expected]
        assert said(call) == []


def test_a_cache_that_cannot_be_written_is_said_once_if_the_user_has_asked_for_it(
    monkeypatch, tmp_path
):
    file = tmp_path / "file"
    file.touch()

    def write():
        for _ in range(2):
            with pytest.raises(OSError, match="file"):
                caches.write("checked", CPU, {})

    monkeypatch.setenv("LORA_KERNELS_CACHE", str(file))
    (line,) = said(write)
    assert line.startswith(
        f"LORA_KERNELS_CACHE must be a directory that can be written, got {str(file)!r}: "
    )
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert said(write) == []


@pytest.mark.parametrize("name", ["LORA_KERNELS_PLAN", "LORA_KERNELS_CPU_PRODUCTS"])
def test_variables_that_decide_about_results_raise(name, monkeypatch):
    monkeypatch.setenv(name, "yes")
    shapes = ((64, 8), (4, 8), (2, 8), (4, 2))
    operands = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
    with pytest.raises(ValueError, match=rf"{name} must be one of .*, got 'yes'"):
        lora_kernels.lora_linear(*operands)
