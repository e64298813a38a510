"""load_adapter's words for a file that lacks what lora-kernels convert has options for."""

import re

import pytest
import torch
from torch import nn

import lora_kernels as lora
from lora_kernels.cli import main


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


def base(source):
    """The plain model of source's base weights."""
    model = nn.Sequential()
    model.lin, model.qkv, model.head = nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(9, 2)
    model.load_state_dict(
        {key: value for key, value in source.state_dict().items() if "lora_" not in key},
        strict=False,
    )
    return model


def message(model, path, **options):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lora\.pt|told\.pt|load_adapter") as caught:
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
    assert text == "load_adapter: lora_alpha must be a finite number, got nan"


def test_all_that_a_file_does_not_tell_is_in_one_message_with_the_command(tmp_path, seed):
    path = tmp_path / "lora.pt"
    source = trained()
    state = {**lora.lora_state_dict(source), "head.weight": source.head.weight.detach()}
    torch.save(state | {"head.bias": source.head.bias.detach()}, path)
    for alpha, option in ((None, "ALPHA"), (4, "4")):
        text = message(base(source), path, lora_alpha=alpha)
        assert ("the file does not hold lora_alpha; " in text) == (alpha is None)
        assert "qkv: a MergedLinear with 2 enabled groups, and the file does not say which" in text
        assert "'head.weight': neither factors of LoRA nor biases" in text
        assert "give" not in text
        (command,) = re.findall("`(.*)`", text)
        assert f" --lora-alpha {option} --enable-lora 1,0,1 --modules-to-save head" in command
    _, *arguments = command.replace("DIRECTORY", str(tmp_path / "made")).split()
    assert main(arguments) == 0
    x = torch.randn(3, 6)
    loaded = lora.load_adapter(base(source), tmp_path / "made")
    assert torch.equal(loaded(x), source(x))


def test_a_whole_state_dict_is_told_apart_from_a_head(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save(dict(trained(qkv=False).state_dict()), path)
    text = message(plain(), path)
    assert "the file does not hold lora_alpha; 'lin.weight', 'head.weight': neither" in text
    assert text.endswith("save lora_state_dict(model) instead): give lora_alpha=")
    assert message(plain(), path, lora_alpha=4).endswith("save lora_state_dict(model) instead)")


def test_what_a_wrong_answer_hides_is_left_to_the_next_message(tmp_path):
    """Groups of two layers that no answer for all of them fits: what is known is said."""
    source = trained()
    source.three = lora.MergedLinear(5, 9, r=2, lora_alpha=4, enable_lora=[True] * 3)
    path = tmp_path / "lora.pt"
    torch.save(dict(lora.lora_state_dict(source)), path)
    text = message(base(source), path)
    assert "the file does not hold lora_alpha; qkv: a MergedLinear" in text or "; three: " in text
    assert "--lora-alpha ALPHA --enable-lora" in text


def test_an_alpha_that_the_file_contradicts_is_named_as_an_argument(tmp_path):
    adapter = tmp_path / "adapter"
    lora.save_adapter(trained(qkv=False), adapter)
    assert main(["convert", str(adapter), str(tmp_path / "told.pt")]) == 0
    text = message(plain(), tmp_path / "told.pt", lora_alpha=8)
    assert "the file says lora_alpha=4, and 8 was given: leave it out" in text
