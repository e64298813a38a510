"""What the formats that hold most keep of an Adapter, and how a path's format is found."""

import dataclasses

import pytest
import torch

from lora_kernels.adapters.formats import FORMATS, recognise
from lora_kernels.adapters.formats.adapter import (
    Adapter,
    AdapterLayer,
    BaseModule,
    Convolution,
    Hints,
    own_factors,
    rank_of_two_convolutions,
)
from lora_kernels.model.targets import LayerSpec
from lora_kernels.spec import OutputSplits

SPLITS = OutputSplits((4, 2, 6), (True, False, True))
# What a file of some format may not say about the adapter below.
HINTS = Hints(
    lora_alpha=6.0,
    lora_dropout=0.25,
    enable_lora=(("qkv", (1, 0, 1)),),
    out_splits=(("qkv", (4, 2, 6)),),
    embedding=("embed",),
    modules_to_save=("head",),
)


def layer(path, kind, a_rows, b_rows, inputs, outputs, splits=None):
    dropout = 0.0 if kind == "embedding" else 0.25
    return AdapterLayer(
        path, BaseModule(kind, inputs, outputs), LayerSpec(2, 6.0, 3.0, dropout, splits),
        torch.randn(a_rows, inputs), torch.randn(b_rows, 2),
    )  # fmt: skip


WHOLE = ("peft", "loralib")  # the formats that hold biases, heads and groups of columns


@pytest.fixture
def adapter(seed):
    """A layer of each kind that these formats have, a bias, and a head with a buffer."""
    layers = [
        layer("block.lin", "linear", 2, 5, 8, 5),
        layer("block.qkv", "linear", 4, 10, 8, 12, SPLITS),
        layer("embed", "embedding", 2, 8, 7, 8),
    ]
    return Adapter(
        layers={layer.path: layer for layer in layers},
        entries={
            "block.lin.bias": torch.randn(5),
            "head.weight": torch.randn(3, 4),
            "head.seen": torch.tensor(3),
        },
        bias="lora_only",
        modules_to_save=["head"],
        target_modules=["block.lin", "block.qkv", "embed"],
    )


@pytest.mark.parametrize("name", WHOLE)
def test_formats_give_back_the_adapter_that_they_wrote(name, adapter, tmp_path):
    path = tmp_path / "adapter"
    assert FORMATS[name].write(adapter, path, HINTS)
    assert recognise(path) == name
    again = FORMATS[name].read(path, HINTS)
    for field in ("bias", "modules_to_save", "target_modules", "restricted", "base_model"):
        assert getattr(again, field) == getattr(adapter, field), field
    assert set(again.layers) == set(adapter.layers)
    for path, expected in adapter.layers.items():
        found = again.layers[path]
        assert (found.path, found.base) == (path, expected.base)
        # PEFT's config has one dropout for all.
        spec = dataclasses.replace(found.spec, lora_dropout=expected.spec.lora_dropout)
        assert spec == expected.spec
        assert torch.equal(found.lora_A, expected.lora_A), path
        assert torch.equal(found.lora_B, expected.lora_B), path
    assert set(again.entries) == set(adapter.entries)
    for key, value in adapter.entries.items():
        assert torch.equal(again.entries[key], value), key


@pytest.mark.parametrize("name", WHOLE)
def test_formats_name_the_file_and_the_key_of_an_entry(name, adapter, tmp_path):
    FORMATS[name].write(adapter, tmp_path / "adapter", HINTS)
    source = FORMATS[name].read(tmp_path / "adapter", HINTS).source
    for entry in ("block.lin.lora_A", "embed.lora_B", "block.lin.bias", "head.weight"):
        place = source.place(entry)
        assert place.startswith(str(tmp_path / "adapter"))
        assert entry.rpartition(".")[0] in place


@pytest.mark.parametrize("kernel", [(1,), (3,), (3, 2), (2, 3), (2, 1, 3)])
def test_own_factors_are_the_delta_of_two_convolutions(kernel, seed):
    rank, inputs, outputs = 3, 4, 5
    a = torch.randn(rank, inputs, *kernel)
    b = torch.randn(outputs, rank, *(1 for _ in kernel))
    r = rank_of_two_convolutions(rank, kernel)
    base = BaseModule("convolution", inputs, outputs, conv=Convolution(kernel))
    own_a, own_b = own_factors(AdapterLayer("conv", base, LayerSpec(r, 1, 1 / r), a, b))
    assert own_a.shape == (r * kernel[0], inputs * kernel[0])
    delta = (own_b @ own_a).view(outputs, inputs, *kernel)
    expected = torch.einsum("or,ri...->oi...", b.reshape(outputs, rank), a)
    torch.testing.assert_close(delta, expected)
