"""The benchmark of experts runs each of its layers, patched and not."""

import re

import pytest

from bench import experts

pytestmark = pytest.mark.usefixtures("unpatched")


def test_main_prints_a_line_for_each_layer_and_number_of_tokens(monkeypatch, capsys):
    monkeypatch.setattr(experts, "DEVICE", "cpu")
    monkeypatch.setattr(experts, "DTYPE", experts.torch.float32)
    monkeypatch.setattr(experts, "HIDDEN", 16)
    small = {name: (kind, 4, 8, 2) for name, (kind, *_) in experts.LAYERS.items()}
    monkeypatch.setattr(experts, "LAYERS", small)
    experts.main(["--tokens", "3,5", "--rounds", "2"])
    _, head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["layer", "tokens"]
    assert [line.split()[0] for line in lines] == [name for name in small for _ in range(2)]
    for line in lines:
        frozen, folded, patched = (float(kept) for kept in re.findall(r"(\d+\.\d) MB", line))
        assert frozen <= patched <= folded
