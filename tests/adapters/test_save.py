"""save_adapter: what it writes, and what it leaves alone."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    apply_lora,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_adapter,
)
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LoRALinear
from tests.adapters.nets import (
    adapted,
    assert_equal_states,
    assert_same_files,
    randomise,
)
from tests.adapters.tied import LORA, SAVED, assert_near, in_peft, is_tied, logits, trained
from tests.model import wrapped


def test_save_adapter_takes_names_of_saved_modules_too(base, tmp_path):
    ours = adapted(base)
    nn.init.normal_(ours.classifier.weight)
    save_adapter(ours, tmp_path, modules_to_save="classifier")
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again.classifier.weight, ours.classifier.weight)


def test_save_adapter_writes_buffers_of_saved_modules(seed, tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ours = adapted(base, target_modules=["0"], modules_to_save=["1"])
    ours(torch.randn(3, 4))
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert_equal_states(again, ours)
    assert again[1].num_batches_tracked == 1


def test_save_adapter_writes_biases_of_other_names_with_bias_all(seed, tmp_path):
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    ours = adapted(base, target_modules=["lin"], bias="all")
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert_equal_states(again, ours)


def test_save_adapter_leaves_nothing_but_the_two_files_and_what_was_there(base, tmp_path):
    (tmp_path / "optimizer.pt").write_text("mine")
    save_adapter(adapted(base), tmp_path)
    save_adapter(adapted(base), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["write", "value"])
def test_save_adapter_leaves_the_earlier_adapter_if_it_fails(broken, base, tmp_path, monkeypatch):
    ours = adapted(base)
    save_adapter(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if broken == "value":
        ours.lin.lora_B.data[0, 0] = math.nan
        expected, message = ValueError, r"lin\.lora_B\.weight is not finite"
    else:
        randomise(ours)

        def dumps(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(json, "dumps", dumps)
        expected, message = OSError, "disk full"
    with pytest.raises(expected, match=message):
        save_adapter(ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_adapter_raises_for_what_is_not_a_lora_model(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layer"):
        save_adapter(nn.Sequential(nn.Linear(2, 2), LoRALinear(2, 2)), tmp_path / "x")
    with pytest.raises(ValueError, match="itself a LoRA layer"):
        save_adapter(LoRALinear(2, 2, r=1), tmp_path / "x")
    model = nn.Sequential(nn.Sequential(LoRALinear(2, 2, r=1)))
    with pytest.raises(ValueError, match=r"0\.0: .*modules_to_save"):
        save_adapter(model, tmp_path / "x", modules_to_save=["0"])
    with pytest.raises(ValueError, match="'missing'"):
        save_adapter(model, tmp_path / "x", modules_to_save=["missing"])
    assert not (tmp_path / "x").exists()


def test_save_adapter_writes_the_same_files_of_a_merged_model(base, tmp_path):
    ours = adapted(base, merge_weights=True)
    save_adapter(ours, tmp_path / "train")
    save_adapter(ours.eval(), tmp_path / "eval")
    assert all(m.merged for m in ours.modules() if isinstance(m, LoRALayer))
    assert_same_files(tmp_path / "train", tmp_path / "eval")


def test_save_adapter_knows_what_trains_of_copies_and_pickles(base, tmp_path):
    ours = adapted(base, bias="lora_only", modules_to_save=["classifier"])
    save_adapter(ours, tmp_path / "ours")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        save_adapter(copied.requires_grad_(False), tmp_path / "copy")
        assert_same_files(tmp_path / "copy", tmp_path / "ours")


@SAVED
def test_save_adapter_writes_both_sides_of_a_tie(saved, tied_base, tmp_path):
    ours = apply_lora(copy.deepcopy(tied_base), target_modules=["q_proj"], **LORA)
    mark_only_lora_as_trainable(ours, modules_to_save=saved)
    save_adapter(trained(ours), tmp_path)
    assert is_tied(ours)
    assert_near(logits(in_peft(tied_base, tmp_path)), logits(ours))
    assert_near(logits(load_adapter(copy.deepcopy(tied_base), tmp_path)), logits(ours))
    tied = apply_lora(copy.deepcopy(tied_base), target_modules=["q_proj"], **LORA)
    assert_near(logits(load_adapter(tied, tmp_path).eval()), logits(ours))


@wrapped.each_way
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_save_adapter_looks_through_wrappers(tmp_path, wrap, bias, seed):
    base = wrapped.Net()
    model = wrapped.adapted(base, bias=bias)
    save_adapter(wrap(copy.deepcopy(model)), tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    wrapped.assert_same(lora_state_dict(loaded, bias), lora_state_dict(model, bias))
    wrapped.assert_same(loaded.state_dict(), model.state_dict())


def test_save_adapter_looks_through_wrappers_around_wrappers(tmp_path, seed):
    model = wrapped.adapted(wrapped.Net())
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)  # needs a process group
    nn.Module.__init__(ddp)
    ddp.module = wrapped.compiled(model)
    save_adapter(wrapped.compiled(ddp), tmp_path)
    loaded = load_adapter(wrapped.Net(), tmp_path)
    wrapped.assert_same(lora_state_dict(loaded), lora_state_dict(model))
