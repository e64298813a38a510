"""The model of the limit gives the table that it was made for."""

import pytest

from bench import roofline

SCHEMES = ("perfect", "split", "sandwich", "lorafusion", "unsloth", "peft")
TOKENS = (16, 512, 8192)

# Modelled time over the frozen layer's on an H200: r = 16, bfloat16, a column per number of tokens.
TABLE = {
    (2048, 2048): (
        "1.03/2.55/3.57/3.57/5.08/7.15",
        "1.02/1.70/2.15/2.18/2.92/4.15",
        "1.02/1.18/1.28/1.32/1.54/2.08",
    ),
    (4096, 4096): (
        "1.01/1.40/1.66/1.66/2.04/2.57",
        "1.01/1.21/1.35/1.36/1.59/2.02",
        "1.01/1.08/1.13/1.14/1.25/1.51",
    ),
    (4096, 14336): (
        "1.01/1.12/1.20/1.19/1.31/1.47",
        "1.01/1.08/1.13/1.12/1.25/1.45",
        "1.01/1.04/1.07/1.06/1.15/1.30",
    ),
    (14336, 4096): (
        "1.01/1.12/1.20/1.20/1.31/1.47",
        "1.01/1.10/1.15/1.18/1.25/1.47",
        "1.01/1.06/1.08/1.11/1.15/1.32",
    ),
    (8192, 8192): (
        "1.01/1.10/1.17/1.17/1.27/1.41",
        "1.01/1.07/1.12/1.12/1.20/1.37",
        "1.01/1.04/1.06/1.07/1.12/1.24",
    ),
}
LLAMA_3_8B = [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]


@pytest.mark.parametrize("shape", TABLE, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("column", range(3), ids=lambda column: f"m{TOKENS[column]}")
def test_table_is_reproduced_to_its_two_decimals(shape, column):
    m = TOKENS[column]
    modelled = "/".join(f"{roofline.ratio(scheme, m, *shape, 16):.2f}" for scheme in SCHEMES)
    assert modelled == TABLE[shape][column]


@pytest.mark.parametrize(
    ("scheme", "printed"), [("split", 1.059), ("sandwich", 1.094), ("peft", 1.38)]
)
def test_seven_linears_of_llama_3_8b_come_within_half_a_percent(scheme, printed):
    total = sum(roofline.seconds(scheme, 8192, k, n, 16) for k, n in LLAMA_3_8B)
    floor = sum(roofline.floor(8192, k, n) for k, n in LLAMA_3_8B)
    assert total / floor == pytest.approx(printed, rel=0.005)


def test_floor_is_arithmetic_for_many_tokens_and_traffic_of_the_weight_for_few():
    assert roofline.floor(8192, 4096, 4096) == pytest.approx(4 * 8192 * 4096**2 / 790e12)
    assert roofline.floor(1, 4096, 4096) == pytest.approx(4 * 4096**2 / 4.3e12, rel=1e-3)


def test_a_part_without_launch_cost_and_with_endless_bandwidth_makes_lora_free():
    part = roofline.Part(flops=1e12, bandwidth=1e30, launch=0.0)
    for scheme in ("sandwich", "unsloth", "peft"):
        assert roofline.ratio(scheme, 512, 768, 768, 16, part) == pytest.approx(1.0)


def test_elements_of_four_bytes_double_the_exposed_passes():
    part = roofline.Part(flops=1e12, bandwidth=4e12, launch=0.0)
    extra = [roofline.ratio("peft", 8192, 4096, 4096, 1, part, e) - 1 for e in (2, 4)]
    assert extra[1] == pytest.approx(2 * extra[0], rel=0.01)


def test_kernels_are_known_by_a_part_of_their_name():
    flops, moved = roofline.kernel_work("_down_kernel_0d1d", 4, 8, 6, 2, element=2)
    assert (flops, moved) == (2 * 4 * 8 * 2, 2 * (4 * 8 + 2 * 8) + 4 * 4 * 2)
    assert roofline.kernel_work("vectorized_elementwise_kernel", 4, 8, 6, 2, 2) is None


def test_the_kernel_that_fills_counts_for_y_and_for_dx():
    m, k, n, r, e = 4, 8, 6, 2, 2
    filled = 2 * (m * k + m * n + r * k + n * r) + 8 * m * r
    assert roofline.kernel_work("_fill_kernel", m, k, n, r, e) == (2 * m * r * (k + n), filled)
