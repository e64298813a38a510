"""load_adapter's words for a file that lacks what lora-kernels convert has options for."""

import re

import pytest
import torch
from torch import nn

import lora_kernels as lora


def made(qkv=True):
    model = nn.Sequential()
    model.lin = lora.Linear(6, 5, r=2, lora_alpha=4)
    if qkv:
        model.qkv = lora.MergedLinear(5, 9, r=2, lora_alpha=4, enable_lora=[True, False, True])
    model.head = nn.Linear(9, 2)
    return model


def trained(**options):
    model = made(**options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def plain():
    model = nn.Sequential()
    model.lin, model.head = nn.Linear(6, 5), nn.Linear(9, 2)
    return model


def message(model, path, **options):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lora\.pt|told\.pt") as caught:
        lora.load_adapter(model, path, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 4}])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("envelope", [None, "model_state_dict", "state_dict"])
def test_a_model_with_the_layers_gets_the_call_that_loads_it(
    options, whole, envelope, tmp_path, seed, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source, model = trained(), made()
    state = source.state_dict() if whole else lora.lora_state_dict(source)
    state = {key: value.clone() for key, value in state.items()}  # without metadata, as loralib's
    torch.save({envelope: state} if envelope else state, "lora.pt")
    text = message(model, "lora.pt", **options)
    call = re.search(r"model\.load_state_dict\(.*strict=False\)", text)
    assert call
    eval(call[0], {"model": model, "torch": torch})
    for key, value in lora.lora_state_dict(source).items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_plain_model_gets_the_name_of_the_argument(tmp_path):
    torch.save(dict(lora.lora_state_dict(trained(qkv=False))), tmp_path / "lora.pt")
    text = message(plain(), tmp_path / "lora.pt")
    assert text.endswith("the file does not hold lora_alpha: give lora_alpha=")
    lora.load_adapter(plain(), tmp_path / "lora.pt", lora_alpha=4)
    text = message(plain(), tmp_path / "lora.pt", lora_alpha=float("nan"))
    assert text.endswith("lora_alpha: lora_alpha must be a finite number, got nan")


def test_what_load_adapter_cannot_be_told_is_convert_s(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save(dict(lora.lora_state_dict(trained())), path)
    text = message(plain(), path, lora_alpha=4)
    assert "load_adapter has no such argument: `lora-kernels convert" in text
    assert "with --enable-lora makes a directory" in text
    torch.save(dict(trained(qkv=False).state_dict()), path)
    assert "with --modules-to-save makes" in message(plain(), path, lora_alpha=4)


def test_an_alpha_that_the_file_contradicts_is_named_as_an_argument(tmp_path):
    adapter = tmp_path / "adapter"
    lora.save_adapter(trained(qkv=False), adapter)
    from lora_kernels.cli import main

    assert main(["convert", str(adapter), str(tmp_path / "told.pt")]) == 0
    text = message(plain(), tmp_path / "told.pt", lora_alpha=8)
    assert "the file says lora_alpha=4, lora_alpha=8: leave lora_alpha= out" in text
