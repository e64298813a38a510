"""What a step saves and launches."""

import pytest
import torch

from bench import counters, implementations, peers
from bench.cells import Cell

CELL = Cell(m=32, k=48, n=40, r=4, dropout_p=0.0)


class Event:
    def __init__(self, name, device_type, us, is_user_annotation=False):
        self.name, self.device_type, self.is_user_annotation = name, device_type, is_user_annotation
        self.time_range = type("Range", (), {"elapsed_us": lambda _: us})()


def test_kernels_counts_launches_on_the_gpu_only():
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        Event("gemm", gpu, 5.0), Event("gemm", gpu, 7.0), Event("fill", gpu, 1.0),
        Event("aten::mm", cpu, 9.0), Event("range", gpu, 20.0, is_user_annotation=True),
    ]  # fmt: skip
    assert counters.kernels(events) == {
        "gemm": {"launches": 2, "us": 12.0},
        "fill": {"launches": 1, "us": 1.0},
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saved_bytes_counts_what_is_kept_beyond_x(dropout_p):
    problem = Cell(**{**vars(CELL), "dropout_p": dropout_p}).problem()
    x = problem.x.requires_grad_()
    element, m, k, r = 4, CELL.m, CELL.k, CELL.r
    h = element * m * r
    seed = 8 * bool(dropout_p)
    assert counters.saved_bytes(implementations.frozen(problem), x) == 0
    assert counters.saved_bytes(implementations.ours(problem), x) == h + seed
    mask = m * k * bool(dropout_p)
    assert counters.saved_bytes(peers.Addmm(problem), x) == h + mask
    if dropout_p == 0:
        assert counters.saved_bytes(peers.Unsloth(problem), x) == 0
