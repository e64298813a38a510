"""What is checked, how it is counted and what is kept of it."""

import pytest
import torch

from lora_kernels.dispatch import cache as caches
from lora_kernels.kernels import selfcheck, shrink
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.registry import LAUNCHERS
from lora_kernels.kernels.selfcheck import Variant
from lora_kernels.tuning import check as checks
from lora_kernels.tuning import workers
from lora_kernels.tuning.check import ALGORITHMS, Checked, as_text, check, variants, wrong

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_every_launcher_algorithm_and_dtype_is_checked():
    found = variants()
    assert len(found) == len(set(found))
    pairs = {(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F16, F32)}
    for name in (*LAUNCHERS, *ALGORITHMS):
        of_name = [variant for variant in found if variant.launcher == name]
        assert {(v.dtype, v.lora_dtype) for v in of_name} == pairs, name
    gemm, narrow = ([v for v in found if v.launcher == "gemm_bwd"], [v for v in found if v.narrow])
    for change in ("dropout", "aligned", "transposed"):
        assert {getattr(v, change) for v in gemm} == {True, False}, change
    assert {v.small_m for v in gemm} == {0, 16, 64}
    assert {v.r for v in gemm} == {16, 64}
    assert {v.enabled for v in gemm} == {(True,), (True, False, True)}
    assert {(v.dtype, v.lora_dtype) for v in narrow} == {(BF16, F32)}
    checked = {v.launcher for v in narrow}
    assert {"gemm_bwd", "grouped_gemm_y", "weight_norm"} <= checked
    assert not checked & {"column_sums", "apply_dropout"}  # no product is in them


@pytest.mark.parametrize("name", ["gemm_small_m", "gemm_small_m_scaled"])
def test_the_kernel_of_few_rows_is_checked_in_every_dtype_with_all_of_its_tiles(name, device):
    taken = [v for v in variants([name]) if selfcheck.key_of(v, device) is not None]
    pairs = {(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F16, F32)}
    for rows, dropout in ((16, True), (64, False)):
        of_rows = [v for v in taken if (v.small_m, v.dropout) == (rows, dropout)]
        assert {(v.dtype, v.lora_dtype) for v in of_rows} == pairs


def test_a_planted_fault_is_found_and_kept(cache, device, monkeypatch):
    def wrong_result(function, grid, **arguments):
        launch(function, grid, **arguments)
        if arguments["x"].ptr.dtype == F16:
            arguments["h_ptr"][..., 3] *= 1.5

    monkeypatch.setattr(shrink, "launch", wrong_result)
    checked = check(device.type, ["shrink", "expand_y"], jobs=1)
    assert {c.variant.dtypes for c in wrong(checked)} == {"float16", "float16/float32"}
    assert {c.variant.launcher for c in wrong(checked)} == {"shrink"}
    text = as_text(checked).splitlines()
    assert text[0].split() == ["right", "of", "bfloat16", "float16", "float32",
                               "bfloat16/float32", "float16/float32"]  # fmt: skip
    assert text[1].split("  ")[0] == "shrink"
    assert "0 of 1" in text[1]
    assert any(line.startswith("shrink float16 r=16 dropout: WrongKernelError: ") for line in text)
    verdicts = caches.read("checked", device)
    assert len(verdicts) == len(checked)
    assert sum(reason is not None for reason in verdicts.values()) == 2


def test_what_was_wrong_once_is_met_again(cache, device):
    """As of a rank that this check does not have: its next use finds it right, if it is."""
    kept = {"shrink float32 r=8 A": None, "expand_y float32 r=8 A": "wrong: once"}
    selfcheck.keep({**kept, "shrink float32 r=8 B": "wrong: once"}, device)
    check(device.type, ["shrink"], jobs=1, seconds=0)
    assert caches.read("checked", device) == kept


def test_algorithms_are_checked_as_a_whole(cache, device, monkeypatch):
    assert not wrong(check(device.type, ["addmm"], jobs=1))
    forward = checks.linear.lora_linear_forward

    def wrong_result(algorithm, *operands):
        y, h = forward(algorithm, *operands)
        return y * 1.05, h

    monkeypatch.setattr(checks.linear, "lora_linear_forward", wrong_result)
    checked = check(device.type, ["addmm"], jobs=1)
    assert wrong(checked) == checked


def test_what_is_not_reached_is_neither_right_nor_wrong(cache, device):
    checked = check(device.type, ["shrink"], jobs=1, seconds=0)
    assert {c.reason for c in checked} == {workers.NOT_REACHED}
    assert wrong(checked) == []
    assert f"0 are wrong, {len(checked)} were not reached in time: " in as_text(checked)
    assert caches.read("checked", device) == {}


def test_processes_check_what_this_one_does(cache, device):
    checked = check(device.type, ["grad_b"], jobs=2)
    assert checked
    assert all(each == Checked(each.variant, None) for each in checked)
    assert checked[0].variant == Variant("grad_b", BF16, BF16)
