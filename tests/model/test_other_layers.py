"""What report and mark_only_lora_as_trainable say of LoRA layers of loralib."""

import warnings

import loralib
import pytest
from torch import nn

import lora_kernels as lora
from lora_kernels.model.other_layers import is_other_lora

HINT = "Import lora_kernels in the place of loralib"


def net(*packages):
    return nn.Sequential(*(package.Linear(8, 8, r=2) for package in packages))


def test_layers_of_loralib_are_others():
    assert is_other_lora(loralib.Linear(8, 8, r=2))
    assert not is_other_lora(lora.Linear(8, 8, r=2))
    assert not is_other_lora(loralib.Linear(8, 8, r=0))


@pytest.mark.parametrize("packages", [(loralib,), (lora, loralib)])
def test_report_names_layers_of_loralib(packages):
    found = lora.report(net(*packages))
    text = " ".join(str(found).split())
    place = str(len(packages) - 1)
    assert len(found) == len(packages) - 1
    assert f"not of this package: '{place}' (loralib.layers.Linear). {HINT}" in text
    assert max(map(len, str(found).splitlines())) <= 100


def test_report_of_own_layers_has_no_remark():
    assert lora.report(net(lora)).remark is None
    assert HINT not in str(lora.report(net(lora)))


def test_marking_a_model_of_loralib_says_whose_its_layers_are():
    model = net(loralib)
    with pytest.warns(RuntimeWarning, match=HINT) as caught:
        lora.mark_only_lora_as_trainable(model)
    assert "'0' (loralib.layers.Linear)" in str(caught[0].message)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]


@pytest.mark.parametrize("packages", [(lora,), (lora, loralib)])
def test_marking_a_model_with_own_layers_is_silent(packages):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.mark_only_lora_as_trainable(net(*packages))
