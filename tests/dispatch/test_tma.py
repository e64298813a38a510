"""why_not_tma, is_tma_compliant: what tensor descriptors hold."""

import pytest
import torch

from lora_kernels.dispatch.tma import is_tma_compliant, rows_fit_tma, why_not_tma

F16 = torch.float16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t, None),
        (lambda t: t.T, None),
        (lambda t: t[:, 8:], None),
        (lambda t: t[:, :40], None),
        (lambda t: t.view(4, 4, 64), None),
        (lambda t: t[:, 1:], "address"),
        (lambda t: t[:, ::2], "no stride is 1"),
        (lambda t: t[:1].expand(8, -1), "overlap"),
        (lambda t: t.flatten()[: 8 * 65].view(8, 65), "65 elements is not a multiple of 16 bytes"),
        (lambda t: t.flatten().as_strided((8, 64), (8, 1)), "overlap"),
        (lambda t: torch.zeros(7, 9, dtype=F16), "9 elements"),
    ],
)
def test_why_not_tma_says_what_is_in_the_way(change, reason):
    matrix = change(torch.zeros(16, 64, dtype=F16))
    said = why_not_tma(matrix)
    assert (said is None) == (reason is None)
    assert reason is None or reason in said
    assert is_tma_compliant(None, matrix) == (reason is None)


def test_is_tma_compliant_is_about_all_of_them():
    good, bad = torch.zeros(16, 64, dtype=F16), torch.zeros(7, 9, dtype=F16)
    assert not is_tma_compliant(good, bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 4, 6, 8, 12, 64])
def test_rows_fit_tma_is_what_a_new_matrix_is(columns, dtype):
    new = torch.empty(3, columns, dtype=dtype)
    assert rows_fit_tma(columns, new) == is_tma_compliant(new)
