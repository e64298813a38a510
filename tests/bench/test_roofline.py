"""FLOPs and bytes of steps and kernels, and what of the ceilings they reach."""

import pytest

from bench import roofline
from bench.roofline import Work

ROW = {
    "kind": "layer", "mode": "forward+backward", "enable_lora": (True,), "dtype": "float16",
    "implementation": "lora_kernels", "m": 4, "k": 8, "n": 6, "r": 2, "median_ms": 3.0,
    "copy_tb_s": 2.0, "product_tflop_s": 100.0,
}  # fmt: skip


def kernels(*names, **changes):
    counted = {name: {"launches": 1, "us": 5.0} for name in names}
    return roofline.kernel_work({**ROW, "kernels": counted, **changes})


def test_step_work_of_the_floor_is_two_products_at_their_least_traffic():
    m, k, n = 4, 8, 6
    traffic = 2 * 2 * (m * k + k * n + m * n)
    assert roofline.step_work(ROW, floor=True)[1:] == (4 * m * k * n, traffic, 3e-3)
    assert roofline.step_work(ROW, floor=False)[1] == 4 * m * k * n + 6 * m * 2 * (k + n)


def test_step_work_has_the_elements_of_its_dtype():
    single = roofline.step_work({**ROW, "dtype": "float32"}, floor=True)
    assert single.moved == 2 * roofline.step_work(ROW, floor=True).moved


def test_kernel_work_knows_kernels_by_a_part_of_their_name():
    (work,) = kernels("_down_kernel_0d1d", "vectorized_elementwise_kernel")
    moved = 2 * (4 * 8 + 2 * 8) + 4 * 4 * 2
    assert work == ("_down_kernel_0d1d", 2 * 4 * 8 * 2, moved, pytest.approx(5e-6))


def test_kernel_work_counts_the_kernel_that_fills_for_y_and_for_dx():
    m, k, n, r, e = 4, 8, 6, 2, 2
    filled = e * (m * k + m * n + r * k + n * r) + 8 * m * r
    (work,) = kernels("_fill_kernel")
    assert (work.flops, work.moved) == (2 * m * r * (k + n), filled)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "model"}, {"mode": "forward"}, {"enable_lora": (True, False)}, {"kernels": None},
        {"implementation": "peft"},
    ],
    ids=str,
)  # fmt: skip
def test_kernel_work_is_of_whole_steps_of_this_packages_linear_layers(changes):
    assert kernels("_down_kernel", **changes) == []


def test_fraction_is_of_the_ceiling_that_binds():
    arithmetic = Work("a", flops=50e9, moved=1e6, seconds=1e-3)  # of 100 TFLOP/s
    traffic = Work("t", flops=1e6, moved=1e9, seconds=1e-3)  # of 2 TB/s
    assert arithmetic.fraction(ROW) == pytest.approx(0.5)
    assert traffic.fraction(ROW) == pytest.approx(0.5)


def test_measure_finds_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(roofline, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(roofline, "ROUNDS", 3)
    found = roofline.measure("cpu", roofline.torch.float32)
    assert found.keys() == {"copy_tb_s", "product_tflop_s", "launch_us"}
    assert all(value > 0 for value in found.values())
