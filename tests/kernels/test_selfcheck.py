"""The check of kernels at their first use: what it finds, when it runs, and what follows."""

import importlib
import json
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from lora_kernels import LoRALinear, LoRAMergedLinear
from lora_kernels.dispatch import fallback
from lora_kernels.kernels import expand, registry, selfcheck, shrink
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.kernels.selfcheck import Variant, WrongKernelError, fault, first_use
from lora_kernels.ops import first_call
from lora_kernels.testing.problem import make_problem

SHRINK = Variant("shrink")


@pytest.fixture(autouse=True)
def fresh(cache, monkeypatch):
    """No kernel was checked or has failed yet."""
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(first_call, "_prepared", set())
    monkeypatch.setattr(fallback, "_failed", {})


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CHECK", "1")


def scaled_output(kernel: str, factor: float, monkeypatch):
    """Plants a fault: outputs of a launcher's kernel are a little off."""

    def wrong(function, grid, **arguments):
        launch(function, grid, **arguments)
        arguments["h_ptr"].mul_(factor)

    monkeypatch.setattr(shrink, "launch", wrong)


@pytest.fixture
def wrong_shrink(monkeypatch):
    scaled_output("shrink", 1.01, monkeypatch)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_is_right(name, device):
    variant = Variant(name, torch.float16, torch.float32, r=4)
    if selfcheck.key_of(variant, device) is None:  # gemm_small_m
        variant = variant._replace(lora_dtype=torch.float16, small_m=16)
    assert selfcheck.key_of(variant, device) is not None
    assert fault(variant, device, guard=True) is None


def test_a_wrong_result_is_a_fault(wrong_shrink, device):
    assert fault(SHRINK, device).startswith("wrong: result rms error")


def test_runs_that_differ_are_a_fault(monkeypatch, device):
    factors = iter((1.0, 1 + 1e-7))  # within the tolerance

    def unsteady(function, grid, **arguments):
        launch(function, grid, **arguments)
        arguments["h_ptr"].mul_(next(factors))

    monkeypatch.setattr(shrink, "launch", unsteady)
    assert fault(SHRINK, device) == "two runs differ"


def test_an_element_that_is_not_written_is_a_fault(monkeypatch, device):
    def forgetful(function, grid, **arguments):
        kept = arguments["h_ptr"][..., -1, -1].clone()
        launch(function, grid, **arguments)
        arguments["h_ptr"][..., -1, -1] = kept

    monkeypatch.setattr(shrink, "launch", forgetful)
    assert "was not written" in fault(SHRINK, device, guard=True)


# Of which the last three draw operands of their own.
DRAWING = ["shrink", "gemm_fwd_scaled", "expand_add_y", "dequantize_4bit"]


@pytest.mark.parametrize("name", DRAWING)
def test_generators_stay_as_they_are(name, device, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(4), torch.rand(4, device=device)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        # It would seed the generators of all GPUs, of which one is put back.
        patch.delattr(torch.cuda, "manual_seed_all")
        assert fault(Variant(name), device) is None
    assert torch.equal(expected[0], torch.rand(4))
    assert torch.equal(expected[1], torch.rand(4, device=device))


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gemm_fwd_scaled", "grad_b"])
def test_the_default_dtype_changes_no_verdict(name, default, monkeypatch, device):
    """h is float32 in every call, so a kernel that takes another is not the one that will run."""
    seen, kernel = [], registry.kernel_of(name).name
    module = importlib.import_module(f"lora_kernels.kernels.{kernel}")

    def noted(function, grid, **arguments):
        seen.append(arguments["h_ptr"].dtype)
        launch(function, grid, **arguments)

    monkeypatch.setattr(module, "launch", noted)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert fault(Variant(name, torch.float16, torch.float16, r=4), device) is None
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(before)
    assert set(seen) == {torch.float32}


def test_threads_put_back_what_was_there(device, monkeypatch):
    first_inside, second_inside, problem = threading.Event(), threading.Event(), make_problem

    def slow_problem(*sizes, **options):
        if threading.current_thread() is first:
            first_inside.set()
            second_inside.wait(0.5)  # in vain, unless both are inside
        else:
            second_inside.set()
            first.join()
        return problem(*sizes, **options)

    monkeypatch.setattr(selfcheck, "make_problem", slow_problem)
    first, second = (
        threading.Thread(target=selfcheck.of_launcher, args=(SHRINK, device)) for _ in range(2)
    )
    before, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        first.start()
        first_inside.wait()
        second.start()
        second.join()
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("m", [16, 17, 64])
def test_few_rows_are_checked_with_the_tiles_that_they_take(m, asked, monkeypatch, device):
    checked = []
    monkeypatch.setattr(selfcheck, "fault", lambda variant, device: checked.append(variant))
    monkeypatch.setenv("LORA_KERNELS_PLAN", "fused")
    LoRALinear(24, 20, r=4).to(device, torch.float16)(
        torch.randn(m, 24, device=device, dtype=torch.float16)
    )
    (few,) = [variant for variant in checked if variant.launcher == "gemm_small_m"]
    assert few.small_m == (16 if m == 16 else 64)


def test_many_groups_have_columns_each(device):
    of_launcher = selfcheck.of_launcher(Variant("shrink", r=2, enabled=(True,) * 70), device)
    assert min(of_launcher.spec.splits.sizes) > 0


def test_first_use_checks_once_and_keeps_the_verdict(asked, monkeypatch, device, cache):
    checked = []
    monkeypatch.setattr(selfcheck, "fault", lambda variant, device: checked.append(variant))
    first_use([SHRINK, Variant("expand_y")], device)
    first_use([SHRINK], device)
    assert checked == [SHRINK, Variant("expand_y")]
    (path,) = cache.glob("checked-*.json")
    verdicts = json.loads(path.read_text())["content"]
    assert list(verdicts.values()) == [None, None]
    assert all(key.startswith(("shrink float32 r=16", "expand_y float32")) for key in verdicts)
    selfcheck._verdicts.clear()  # a new process
    first_use([SHRINK, Variant("grad_b")], device)
    assert checked[2:] == [Variant("grad_b")]


def test_another_configuration_is_checked_for_itself(asked, monkeypatch, device):
    checked = []
    monkeypatch.setattr(selfcheck, "fault", lambda variant, device: checked.append(variant))
    first_use([SHRINK], device)
    when, _ = registry.entry_for("shrink", selfcheck.of_launcher(SHRINK, device))
    monkeypatch.setattr(selfcheck, "entry_for", lambda name, o: (when, "another"))
    first_use([SHRINK], device)
    assert checked == [SHRINK, SHRINK]


def test_tf32_is_checked_for_itself(asked, monkeypatch, device):
    checked = []
    monkeypatch.setattr(selfcheck, "fault", lambda variant, device: checked.append(variant))
    half = Variant("shrink", torch.float16, torch.float16)
    for allowed in (False, True):
        monkeypatch.setattr(selfcheck, "tf32_allowed", lambda allowed=allowed: allowed)
        first_use([SHRINK, half], device)
    assert checked == [SHRINK, half, SHRINK]


def test_a_wrong_kernel_is_refused_in_this_process_and_the_next(asked, wrong_shrink, device):
    for _ in range(2):
        with pytest.raises(WrongKernelError, match=r"shrink float32 .* is not right .*wrong: "):
            first_use([Variant("expand_y"), SHRINK], device)
        selfcheck._verdicts.clear()


@pytest.mark.parametrize("value", ["0", None])
def test_it_can_be_turned_off(value, wrong_shrink, monkeypatch, device):
    if value is None:
        if device.type == "cuda":
            pytest.skip("a GPU is checked unasked")
        monkeypatch.delenv("LORA_KERNELS_CHECK", raising=False)
    else:
        monkeypatch.setenv("LORA_KERNELS_CHECK", value)
    first_use([SHRINK], device)


def test_a_directory_that_cannot_be_written_stops_nothing(asked, monkeypatch, device, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first_use([SHRINK], device)


@pytest.mark.parametrize("algorithm", ["fused"], indirect=True)
def test_a_layer_does_without_a_kernel_that_is_wrong(algorithm, asked, wrong_shrink, device, seed):
    layer = LoRALinear(24, 20, r=4, lora_alpha=8).to(device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(70, 24, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer(x)
        layer(x)
    said = [str(w.message) for w in caught if "lora_linear_forward" in str(w.message)]
    assert len(said) == 2  # fused and addmm, once each
    assert all("shrink float32 r=4 is not right on this GPU (wrong:" in line for line in said)
    assert "LORA_KERNELS_CHECK=0" in said[0]
    expected = torch.nn.functional.linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A)
    torch.testing.assert_close(y, expected + layer.bias)


@pytest.mark.parametrize("algorithm", ["fused"], indirect=True)
def test_a_kernel_that_the_call_does_not_need_may_be_wrong(
    algorithm, asked, monkeypatch, device, seed
):
    def wrong(function, grid, **arguments):
        raise AssertionError("not launched")

    monkeypatch.setattr(expand, "launch", wrong)
    x = torch.randn(70, 24, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        LoRALinear(24, 20, r=4).to(device)(x)


def test_a_tool_that_is_not_there_fails_as_a_kernel_does(monkeypatch, device):
    def fault_of_code(compiled, device):
        raise FileNotFoundError(2, "No such file or directory", "cuobjdump")

    monkeypatch.setattr(selfcheck.hazards, "fault", fault_of_code)
    with pytest.raises(fallback.KernelError, match=r"FileNotFoundError: .*cuobjdump"):
        fault(SHRINK, device)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_groups_are_right(name, device):
    variant = Variant(name, r=4, enabled=(True, False, True))
    key = selfcheck.key_of(variant, device)
    if key is None:
        pytest.skip("takes one group")
    assert key.startswith(f"{name} float32 r=4 dropout groups 101")
    first, *others = selfcheck.of_launcher(variant, device).spec.splits.sizes
    assert first > others[0] == others[1]
    assert fault(variant, device, guard=True) is None


@pytest.mark.parametrize("algorithm", ["fused"], indirect=True)
def test_the_groups_of_a_layer_are_checked(algorithm, asked, monkeypatch, device):
    checked = []
    monkeypatch.setattr(selfcheck, "fault", lambda variant, device: checked.append(variant))
    layer = LoRAMergedLinear(24, 36, r=4, enable_lora=[False, True, True], lora_dropout=0.1)
    layer.to(device)(torch.randn(70, 24, device=device))
    assert {variant.launcher for variant in checked} == {"shrink", "gemm_fwd"}
    assert {variant.enabled for variant in checked} == {(False, True, True)}


@pytest.mark.parametrize("name", [
    "shrink", "gemm_fwd", "grad_b", "expand_grad_a", "grouped_shrink_h", "grouped_gemm_dx",
    "grouped_grad_b", "weight_norm",
])  # fmt: skip
def test_narrow_factors_are_right(name, device):
    variant = Variant(name, torch.float16, torch.float32, r=4, narrow=True)
    assert selfcheck.key_of(variant, device).startswith(
        f"{name} float16/float32 r=4 dropout narrow"
    )
    assert selfcheck.of_launcher(variant, device).spec.narrow
    assert fault(variant, device, guard=True) is None


def test_python_without_asserts_finds_what_is_wrong(cache):
    """python -O leaves them out, and a verdict is kept for all later runs."""
    code = """
import torch
from lora_kernels.kernels import shrink
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.selfcheck import Variant, fault

def forgetful(function, grid, **arguments):
    kept = arguments["h_ptr"][..., -1, -1].clone()
    launch(function, grid, **arguments)
    arguments["h_ptr"][..., -1, -1] = kept

def wrong(function, grid, **arguments):
    launch(function, grid, **arguments)
    arguments["h_ptr"].mul_(2)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for plant, guard in ((wrong, False), (forgetful, True)):
    shrink.launch = plant
    print(fault(Variant("shrink"), device, guard))
"""
    done = subprocess.run(
        [sys.executable, "-O", "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    two = done.stdout.splitlines()
    assert len(two) == 2, done.stderr
    assert two[0].startswith("wrong: result rms error")
    assert two[1] == "wrong: an element of an output was not written"
