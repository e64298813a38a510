"""FLOPs and bytes of steps and kernels, and what of the ceilings they reach."""

import pytest

from bench import roofline
from bench.roofline import Work

ROW = {
    "kind": "layer", "mode": "forward+backward", "enable_lora": (True,), "dtype": "float16",
    "implementation": "lora_kernels", "m": 4, "k": 8, "n": 6, "r": 2, "median_ms": 3.0,
    "copy_tb_s": 2.0, "product_tflop_s": 100.0,
}  # fmt: skip


def kernels(*names, launches=1, **changes):
    counted = {name: {"launches": launches, "us": 5.0} for name in names}
    return roofline.kernel_work({**ROW, "kernels": counted, **changes})


def test_step_work_of_the_floor_is_two_products_at_their_least_traffic():
    m, k, n = 4, 8, 6
    traffic = 2 * 2 * (m * k + k * n + m * n)
    assert roofline.step_work(ROW, floor=True)[1:] == (4 * m * k * n, traffic, 3e-3)
    assert roofline.step_work(ROW, floor=False)[1] == 4 * m * k * n + 6 * m * 2 * (k + n)


def test_step_work_has_the_elements_of_its_dtype():
    single = roofline.step_work({**ROW, "dtype": "float32"}, floor=True)
    assert single.moved == 2 * roofline.step_work(ROW, floor=True).moved


def test_kernel_work_knows_kernels_by_the_beginning_of_their_name():
    others = ("vectorized_elementwise_kernel", "_split_k_reduce_kernel")
    (work,) = kernels("_shrink_kernel_0d1d", *others)
    moved = 2 * (4 * 8 + 2 * 8) + 4 * 4 * 2
    assert work == ("_shrink_kernel_0d1d", 2 * 4 * 8 * 2, moved, pytest.approx(5e-6))


def test_kernel_work_takes_expand_grad_a_for_what_it_is():
    """The name of grad_a's kernel is the end of its name."""
    expand_grad_a, grad_a = kernels("_expand_grad_a_kernel", "_grad_a_kernel")
    assert expand_grad_a.flops == 2 * grad_a.flops == 4 * 4 * 8 * 2


def test_kernel_work_counts_expand_for_y_and_if_it_runs_twice_for_dx():
    m, k, n, r, e = 4, 8, 6, 2, 2
    for_y, for_dx = (e * (m * columns + r * columns) + 4 * m * r for columns in (n, k))
    (once,) = kernels("_expand_kernel")
    assert (once.flops, once.moved) == (2 * m * r * n, for_y)
    (twice,) = kernels("_expand_kernel", launches=2)
    assert (twice.flops, twice.moved) == (2 * m * r * (k + n), for_y + for_dx)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "model"}, {"mode": "forward"}, {"enable_lora": (True, False)}, {"kernels": None},
        {"implementation": "peft"},
    ],
    ids=str,
)  # fmt: skip
def test_kernel_work_is_of_whole_steps_of_this_packages_linear_layers(changes):
    assert kernels("_shrink_kernel", **changes) == []


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
