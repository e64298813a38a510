"""loralib's file: what is read out of one, and what the hints add."""

import loralib
import pytest
import torch
from torch import nn

from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.loralib import read, write
from lora_kernels.spec import OutputSplits

LINEAR = {"deep.out.lora_A": torch.ones(4, 8), "deep.out.lora_B": torch.ones(6, 4)}
MERGED = {"qkv.lora_A": torch.ones(4, 8), "qkv.lora_B": torch.ones(8, 2)}


@pytest.fixture
def saved(tmp_path):
    """Saves a state dict; the file."""

    def save(state):
        torch.save(state, tmp_path / "lora.pt")
        return tmp_path / "lora.pt"

    return save


def test_loralib_file_is_read_with_alpha_of_the_hints(saved):
    adapter = read(saved(LINEAR), Hints(lora_alpha=8.0, lora_dropout=0.5, fan_in_fan_out=True))
    (layer,) = adapter.layers.values()
    assert (layer.base.kind, layer.base.inputs, layer.base.outputs) == ("linear", 8, 6)
    assert layer.base.fan_in_fan_out
    assert (layer.spec.r, layer.spec.lora_alpha, layer.spec.scaling) == (4, 8.0, 2.0)
    assert (layer.spec.lora_dropout, layer.spec.splits) == (0.5, None)
    assert adapter.target_modules == ["deep.out"]
    assert (adapter.bias, adapter.modules_to_save, dict(adapter.entries)) == ("none", [], {})


@pytest.mark.parametrize(
    ("enable_lora", "out_splits", "sizes"),
    [
        ((("", (1, 0, 1)),), (), (4, 4, 4)),
        ((("", (1, 1, 0)), ("qkv", (0, 1, 1))), (("", (9, 5, 3)),), (9, 5, 3)),
    ],
)
def test_loralib_groups_come_from_the_hints(saved, enable_lora, out_splits, sizes):
    hints = Hints(lora_alpha=1.0, enable_lora=enable_lora, out_splits=out_splits)
    spec = read(saved(MERGED), hints).layers["qkv"].spec
    flags = tuple(flag == 1 for flag in enable_lora[-1][1])
    assert spec.splits == OutputSplits(sizes, flags)


@pytest.mark.parametrize(
    ("hints", "named"),
    [
        ({"enable_lora": (("", (1, 1, 1)),)}, r"qkv: --enable-lora must enable 2 groups"),
        ({"enable_lora": (("", (1, 2, 1)),)}, r"qkv: --enable-lora must enable 2 groups"),
        (
            {"enable_lora": (("", (1, 1)),), "out_splits": (("", (5, 4)),)},
            r"qkv\.lora_B: .* 9 rows",
        ),
        ({"enable_lora": (("", (1, 1)),), "out_splits": (("", (8, 0)),)}, "qkv: --out-splits must"),
        ({"enable_lora": (("", (1, 1)),), "out_splits": (("", (8,)),)}, "qkv: --out-splits must"),
        ({"embedding": ("qkv",)}, r"qkv\.lora_A: shape must be \[2, 8\] for an embedding"),
    ],
)
def test_loralib_groups_that_do_not_fit_are_named(saved, hints, named):
    with pytest.raises(ValueError, match=rf"lora\.pt: {named}"):
        read(saved(MERGED), Hints(lora_alpha=1.0, **hints))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("deep", "is a tensor and the path of other tensors"),
        ("deep.out.forward", "'forward' cannot be a name"),
        ("deep..bias", "a name in it is empty"),
    ],
)
def test_loralib_keys_that_no_model_can_have_are_named(saved, key, named):
    with pytest.raises(ValueError, match=rf"lora\.pt: {key}: {named}"):
        read(saved(LINEAR | {key: torch.ones(2)}), Hints(lora_alpha=1.0))


def test_loralib_convolutions_are_refused_with_the_way_out(saved):
    model = nn.ModuleDict({"conv": loralib.Conv2d(3, 4, 3, r=2)})
    state = {**loralib.lora_state_dict(model), "conv.conv.bias": model["conv"].conv.bias.detach()}
    with pytest.raises(ValueError, match=r"conv: a convolution; .* lora_kernels\.save_adapter"):
        read(saved(state), Hints(lora_alpha=1.0))


def test_loralib_file_is_written_with_entries_first(saved, tmp_path):
    adapter = read(saved(LINEAR | {"deep.out.bias": torch.ones(6)}), Hints(lora_alpha=1.0))
    lines = write(adapter, tmp_path / "again.pt")
    assert list(torch.load(tmp_path / "again.pt")) == ["deep.out.bias", *LINEAR]
    assert lines[1] == "  Linear(r=4, lora_alpha=1): deep.out"
