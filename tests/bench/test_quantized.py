"""The benchmark over quantised layers: every implementation takes part, and the patch is on."""

import re

import pytest
import torch

from bench import quantized

pytestmark = pytest.mark.usefixtures("unpatched")


def test_main_prints_a_line_for_each_cell(monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized, "DEVICE", "cpu")
    monkeypatch.setattr(quantized, "TOKENS", 8)
    threads = torch.get_num_threads()
    try:
        quantized.main(["--widths", "64", "--rounds", "1", "--dtypes", "float32"])
    finally:
        torch.set_num_threads(threads)
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "8 tokens, rank 16, cpu" in title
    assert head.split()[1:] == ["frozen", "PEFT", "patched", "own", "patched/PEFT"]
    kinds = [kind for kind in quantized.KINDS for _ in range(2)]
    assert [line.split()[0] for line in lines] == kinds
    for line in lines:
        kept = [float(each) for each in re.findall(r"(\d+\.\d)%", line)]
        assert kept[2] == kept[3] <= 25.5  # h [8, 16] beside x [8, 64], and a seed
        assert kept[1] >= kept[2] - 0.1
