"""lora-kernels convert --merged: a state dict that loralib saved in eval mode gets base weights."""

import os

import loralib
import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels.cli import main

ALPHA = 6


def layers(lib):
    return nn.ModuleDict(
        {
            "lin": lib.Linear(6, 4, r=2, lora_alpha=ALPHA),
            "turned": lib.Linear(6, 4, r=2, lora_alpha=ALPHA, fan_in_fan_out=True),
            "square": lib.Linear(4, 4, r=3, lora_alpha=ALPHA),
            "qkv": lib.MergedLinear(5, 9, r=2, lora_alpha=ALPHA, enable_lora=[True, False, True]),
            "embed": lib.Embedding(7, 3, r=2, lora_alpha=ALPHA),
            "conv": lib.Conv2d(2, 3, 3, r=2, lora_alpha=ALPHA),
            "norm": nn.LayerNorm(4),
        }
    )


@pytest.fixture
def files(tmp_path, monkeypatch, seed):
    """The model of loralib, whose state dict in eval mode is in merged.pt."""
    monkeypatch.chdir(tmp_path)
    model = layers(loralib).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    torch.save(model.state_dict(), "merged.pt")
    return model, base


def convert(*options):
    return main(["convert", "--merged", "merged.pt", "base.pt", *options])


def test_the_weights_are_those_of_train_mode(files, capsys):
    model, base = files
    flags = ["--lora-alpha", str(ALPHA), "--enable-lora", "1,0,1"]
    assert convert(*flags) == 0
    said = capsys.readouterr().out
    assert "base.pt: 6 weights without the update that was in them, with lora_alpha 6" in said
    assert "taken for convolutions: conv" in said
    assert "do not tell a convolution" not in said  # the weights beside them do
    assert "square weights, taken as [out, in]: square;" in said
    written = torch.load("base.pt")
    assert list(written) == list(base)
    for name, value in written.items():
        torch.testing.assert_close(value, base[name], rtol=0, atol=1e-13)
    ours = layers(lora_kernels).double().eval()
    ours.load_state_dict(written)
    for name, layer in model.items():
        if name not in ("conv", "norm"):
            merged = ours[name].merged_weight()
            torch.testing.assert_close(merged, layer.weight.detach(), rtol=0, atol=1e-13)


def test_hints_tell_the_layout_of_a_square_weight(files, capsys):
    state = torch.load("merged.pt")
    state = {key: value for key, value in state.items() if key.startswith("square")}
    b, a = state["square.lora_B"], state["square.lora_A"]
    base = state["square.weight"] - b @ a * (ALPHA / 3)
    turned = base.T + (b @ a).T * (ALPHA / 3)
    for option in (["--fan-in-fan-out"], ["--embedding", "square"]):
        torch.save(state | {"square.weight": turned}, "merged.pt")
        assert convert("--lora-alpha", str(ALPHA), *option) == 0
        assert "square weights" not in capsys.readouterr().out
        written = torch.load("base.pt")["square.weight"]
        torch.testing.assert_close(written, base.T, rtol=0, atol=1e-13)
        os.remove("base.pt")


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (lambda s: s.pop("lin.weight"), ["--enable-lora", "1,0,1"], "lin.weight: missing"),
        (lambda s: None, ["--enable-lora", "1,0"], "qkv: --enable-lora must enable 2 groups"),
        (
            lambda s: s.update({"lin.weight": torch.zeros(6, 5)}),
            ["--enable-lora", "1,0,1"],
            "lin: weight [6, 5] does not fit",
        ),
        (
            lambda s: s.update({"conv.lora_A": torch.zeros(5, 6)}),
            ["--enable-lora", "1,0,1"],
            "conv: lora_A and lora_B do not fit weight",
        ),
        (lambda s: s.clear(), [], "must hold a state dict"),
    ],
    ids=["no weight", "groups", "shape", "conv", "empty"],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    files, tmp_path, capsys, change, options, named
):
    state = torch.load("merged.pt")
    change(state)
    torch.save(state, "merged.pt")
    assert convert("--lora-alpha", str(ALPHA), *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "merged.pt" in line
    assert not (tmp_path / "base.pt").exists()


def test_a_file_of_this_package_is_refused(files, tmp_path, capsys):
    """Its weights have no update in them in any mode."""
    torch.save(layers(lora_kernels).eval().state_dict(), "merged.pt")
    assert convert("--lora-alpha", "1", "--enable-lora", "1,0,1") == 2
    assert "merged.pt: lora_kernels has saved it" in capsys.readouterr().err
    assert not (tmp_path / "base.pt").exists()


@pytest.mark.parametrize("name", ["merged.pt", "base.pt"])
def test_a_destination_that_is_there_is_left_alone(files, tmp_path, capsys, name):
    torch.save({"other": torch.ones(1)}, "base.pt")
    before = (tmp_path / name).read_bytes()
    flags = ["--lora-alpha", str(ALPHA), "--enable-lora", "1,0,1"]
    assert main(["convert", "--merged", "merged.pt", name, *flags]) == 2
    assert f"{name}: is there already" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_a_directory_is_no_source(files, tmp_path, capsys):
    (tmp_path / "merged.pt").unlink()
    (tmp_path / "merged.pt").mkdir()
    assert convert("--lora-alpha", "1") == 2
    assert "merged.pt: is a directory" in capsys.readouterr().err


def test_a_directory_is_no_destination(files, tmp_path, capsys):
    (tmp_path / "base.pt").mkdir()
    assert convert("--lora-alpha", "1", "--enable-lora", "1,0,1") == 2
    assert "base.pt: is a directory" in capsys.readouterr().err
