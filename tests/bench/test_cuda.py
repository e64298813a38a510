"""The parts of CUDA timing that need no GPU, and the others where there is one."""

import os

import pytest
import torch

from bench import counters, cuda, timing

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_stack_of_weights_does_not_fit_into_l2_and_is_bounded():
    weight = torch.empty(1024, 1024)  # 4 MiB
    assert cuda.cold_copies(weight, l2=50 << 20) == 38
    assert cuda.cold_copies(weight, l2=1 << 20) == 1
    assert cuda.cold_copies(weight, l2=50 << 30) == cuda.MOST_COPIES


def test_line_of_nvidia_smi_is_read_by_name():
    state = cuda.parse_state("570.86.15, 1980, 3201, 41, 312.40\n")
    assert state["driver_version"] == "570.86.15"
    assert state["clocks.sm"] == "1980"
    assert state["power.draw"] == "312.40"


def test_missing_nvidia_smi_is_said_and_no_error(monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", "")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: type("Properties", (), {"uuid": "0-1"})
    )
    assert "nvidia-smi" in cuda.gpu_state()["error"]


class Event:
    def __init__(self, name, device_type, us, is_user_annotation=False):
        self.name, self.device_type, self.is_user_annotation = name, device_type, is_user_annotation
        self.time_range = type("Range", (), {"elapsed_us": lambda _: us})()


def test_launches_are_counted_on_the_gpu_only():
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        Event("gemm", gpu, 5.0), Event("gemm", gpu, 7.0), Event("fill", gpu, 1.0),
        Event("aten::mm", cpu, 9.0), Event("range", gpu, 20.0, is_user_annotation=True),
    ]  # fmt: skip
    assert counters.kernels(events) == {
        "gemm": {"launches": 2, "us": 12.0},
        "fill": {"launches": 1, "us": 1.0},
    }


@needs_gpu
@pytest.mark.parametrize("hide_launch", [True, False])
def test_events_measure_a_longer_call_as_longer(hide_launch):
    x = torch.randn(2048, 2048, device="cuda")

    def products(count):
        return lambda: [x @ x for _ in range(count)]

    stopwatch = cuda.Events(hide_launch)
    for count in (1, 20):
        stopwatch(products(count))
    assert stopwatch(products(20)) > 5 * stopwatch(products(1))


@needs_gpu
@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_captured_step_gives_what_the_step_gives_and_draws_anew(mode):
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5)).cuda()
    x, dy = (torch.randn(32, 64, device="cuda") for _ in range(2))
    step = timing.step([module], x.requires_grad_(), dy, mode)
    replayed = cuda.capture(step, random=True)
    replayed.prepare()
    replayed.call()


@needs_gpu
def test_step_that_repeats_its_dropout_is_refused():
    x = torch.randn(32, 64, device="cuda")
    with pytest.raises(cuda.CannotCaptureError, match="repeats its dropout mask"):
        cuda.capture(timing.Step(lambda: [x * 2]), random=True)


@needs_gpu
def test_step_that_waits_for_the_gpu_cannot_be_captured():
    x = torch.ones(1, device="cuda")
    with pytest.raises(cuda.CannotCaptureError, match="not under a CUDA graph"):
        cuda.capture(timing.Step(lambda: [x * x.item()]), random=False)
