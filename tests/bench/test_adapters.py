"""The benchmark of many adapters: every implementation takes part, and computes the same."""

import pytest
import torch

from bench import adapters


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(adapters, "WIDTH", 8)
    monkeypatch.setattr(adapters, "SAMPLES", 4)
    monkeypatch.setattr(adapters, "TOKENS", 2)


def test_main_prints_each_implementation_and_its_ratio(small, capsys):
    threads = torch.get_num_threads()
    try:
        adapters.main(["--adapters", "2,4", "--rounds", "2"])
    finally:
        torch.set_num_threads(threads)
    title, *lines = capsys.readouterr().out.splitlines()
    assert "8 x 8, 4 samples of 2 tokens" in title
    assert [line.split()[0] for line in lines] == ["2"] * 4 + ["4"] * 4
    assert all(line.endswith("x frozen") for line in lines)
    assert float(lines[0].split()[-3]) == 1
    assert "PEFT, one by one" in lines[3]


def test_every_adapter_trains_in_every_step_but_the_frozen_one(small, monkeypatch):
    layers = []
    original = adapters._peft_layer

    def remember(ranks):
        layers.append(original(ranks))
        return layers[-1]

    made = adapters.lora_kernels.MultiLoRALinear.from_linear
    monkeypatch.setattr(adapters, "_peft_layer", remember)
    monkeypatch.setattr(
        adapters.lora_kernels.MultiLoRALinear,
        "from_linear",
        lambda *args: layers.append(made(*args)) or layers[-1],
    )
    runs, clear = adapters.steps(4)
    ours, theirs = layers
    trained = {}
    for name, run in [*reversed(runs.items()), *runs.items()]:
        clear()
        run()
        trained[name] = [
            sum(p.grad is not None for p in layer.parameters()) for layer in (ours, theirs)
        ]
    assert trained == {
        "frozen layer": [0, 0],
        "lora_kernels": [8, 0],
        "PEFT, adapter_names": [0, 8],
        "PEFT, one by one": [0, 8],
    }
