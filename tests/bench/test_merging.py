"""The benchmark of eval(): every library takes part in every round, in the mode that is timed."""

import pytest

from bench import merging


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(merging, "LAYERS", 3)
    monkeypatch.setattr(merging, "WIDTH", 8)


def test_main_prints_each_library_and_its_ratio(small, capsys):
    merging.main(["--rounds", "2"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert "eval() of 3 layers of 8 x 8" in title
    assert [line.split()[0] for line in lines] == ["loralib", "lora_kernels"]
    assert all(float(line.split()[1]) > 0 for line in lines)
    assert float(lines[1].split()[3]) == 1


def test_what_is_timed_merges(small, monkeypatch):
    merged = []

    class Training(merging.Training):
        def subject(self):
            subject = super().subject()

            def call():
                before = any(layer.merged for layer in self.model)
                subject.call()
                merged.append((before, all(layer.merged for layer in self.model)))

            return merging.Subject(call, subject.prepare)

    monkeypatch.setattr(merging, "Training", Training)
    merging.main(["--rounds", "1"])
    assert merged == [(False, True)] * 4
