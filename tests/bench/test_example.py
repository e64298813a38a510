"""The example is short, and runs from top to bottom."""

from pathlib import Path

from bench import example


def test_main_prints_both_times_and_their_ratio(monkeypatch, capsys):
    for name, value in {"DEVICE": "cpu", "M": 16, "K": 24, "N": 20, "R": 4, "ROUNDS": 3}.items():
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(example, "DTYPE", example.torch.float32)
    example.main()
    ours, formula, ratio = capsys.readouterr().out.splitlines()
    assert ours.startswith("ours ")
    assert formula.startswith("formula ")
    assert float(ratio.split()[3].rstrip(",")) > 0


def test_main_fits_on_a_page():
    assert len(Path(example.__file__).read_text().splitlines()) <= 80
