"""The benchmark over quantised layers: every implementation takes part, and the patch is on."""

import re

import pytest
import torch

from bench import quantized

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_main_prints_a_line_for_each_cell(dora, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized, "DEVICE", "cpu")
    monkeypatch.setattr(quantized, "TOKENS", 8)
    threads = torch.get_num_threads()
    try:
        arguments = ["--widths", "64", "--rounds", "1", "--dtypes", "float32"]
        quantized.main(arguments + ["--dora"] * dora)
    finally:
        torch.set_num_threads(threads)
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "8 tokens, rank 16, cpu" in title
    columns = ["frozen", "PEFT", "patched", "own"] + ["own", "LoRA"] * dora
    assert head.split()[1:] == [*columns, "patched/PEFT"]
    skipped = [line for line in lines if "second forward" in line]
    assert len(skipped) == dora
    lines = [line for line in lines if line not in skipped]
    kinds = [kind for kind in quantized.KINDS for _ in range(2) if not (dora and kind == "int8")]
    assert [line.split()[0] for line in lines] == kinds
    for line in lines:
        kept = [float(each) for each in re.findall(r"(\d+\.\d)%", line)]
        # h [8, 16] beside x [8, 64], and a seed; with a magnitude y, norm [64] and no more
        assert kept[2] == kept[3] <= (140 if dora else 25.5)
        assert kept[1] >= kept[2] - (14 if dora else 0.1)
