"""What a row says of the machine: versions, and the state of a GPU as nvidia-smi tells it."""

import os

import pytest
import torch

from lora_kernels.tuning import machine


def test_gpu_state_is_read_by_name_from_the_line_of_nvidia_smi():
    state = machine.parse_state("570.86.15, 1980, 3201, 41, 312.40\n")
    assert state["driver_version"] == "570.86.15"
    assert state["clocks.sm"] == "1980"
    assert state["power.draw"] == "312.40"


def test_gpu_state_says_if_nvidia_smi_is_missing_and_raises_nothing(monkeypatch):
    monkeypatch.setitem(os.environ, "PATH", "")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: type("Properties", (), {"uuid": "0-1"})
    )
    assert "nvidia-smi" in machine.gpu_state()["error"]


def test_describe_of_a_cpu_names_no_gpu():
    described = machine.describe("cpu")
    assert described["torch"] == torch.__version__
    assert described["gpu"] is described["capability"] is described["driver"] is None
    assert described["commit"]


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_kernels_are_interpreted_for_every_value_that_triton_takes(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert machine.device_of_kernels() == torch.device("cpu")
