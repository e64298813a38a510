"""Adapters with DoRA: from here to PEFT and back, and files whose magnitudes do not fit."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import apply_lora, load_adapter, lora_state_dict, save_adapter
from lora_kernels.cli import main

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.lin.lora_magnitude_vector"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.mix = nn.Embedding(11, 8), nn.Linear(8, 6), Conv1D(5, 6)

    def forward(self, ids):
        return self.mix(torch.tanh(self.lin(self.embed(ids))))


@pytest.fixture
def base(seed):
    return Net().double().eval()


IDS = torch.arange(10).view(2, 5)
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["lin", "mix"], "use_dora": True}


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def in_peft(base, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out
        config = peft.LoraConfig(**{**LORA, **options})
        return trained(peft.get_peft_model(copy.deepcopy(base), config)).eval()


def ours(base, **options):
    return trained(apply_lora(copy.deepcopy(base), **{**LORA, **options})).eval()


def assert_equal(actual, expected):
    """In float64, so some thousand roundings: PEFT takes its norms of the whole W + s·B·A."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 3}, "alpha_pattern": {"mix": 5}},
    "all-linear": {"target_modules": r"lin|mix", "lora_dropout": 0.1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("merge_weights", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "model with DoRA"])
def test_from_peft(adapted, merge_weights, options, base, tmp_path):
    theirs = in_peft(base, **options)
    theirs.save_pretrained(tmp_path)
    model = ours(base, **options) if adapted else copy.deepcopy(base)
    load_adapter(model, tmp_path, merge_weights=merge_weights)
    assert model.lin.use_dora
    assert model.lin.merged == (merge_weights and not adapted)
    assert_equal(model(IDS), theirs(IDS))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == set(lora_state_dict(model))
    assert sum("magnitude" in name for name in training) == 2


@every_option
def test_to_peft_and_back(options, base, tmp_path):
    model = ours(base, **options)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_equal(loaded(IDS), model(IDS))
    assert_equal(load_adapter(copy.deepcopy(base), tmp_path)(IDS), model(IDS))
    if options == {}:
        merged = loaded.merge_and_unload()
        weights = model.lin.merged_weight(), model.mix.merged_weight()
        assert_equal((merged.lin.weight.data, merged.mix.weight.data), weights)


def test_an_adapter_without_dora_says_so(base, tmp_path):
    save_adapter(ours(base, use_dora=False), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is False


def test_the_key_may_end_with_weight(base, tmp_path):
    theirs = in_peft(base)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{KEY}.weight"] = tensors.pop(KEY)
    save_file(tensors, tmp_path / WEIGHTS)
    assert_equal(load_adapter(copy.deepcopy(base), tmp_path)(IDS), theirs(IDS))


def drop(tensors):
    del tensors[KEY]


def put(value):
    return lambda tensors: tensors.update({KEY: value(tensors[KEY])})


def orphan(tensors):
    tensors["base_model.model.other.lora_magnitude_vector"] = tensors[KEY].clone()


def both(tensors):
    tensors[f"{KEY}.weight"] = tensors[KEY].clone()


BAD = {
    "missing": (drop, "lin.lora_magnitude_vector: missing, though .* has use_dora: .*to false"),
    "short": (put(lambda v: v[1:].clone()), r"lin.lora_magnitude_vector: shape must be \[6\]"),
    "a row": (put(lambda v: v[None].clone()), r"lin.lora_magnitude_vector: shape must be \[6\]"),
    "integers": (put(lambda v: v.long()), "lin.lora_magnitude_vector: dtype must be floating"),
    "of no layer": (orphan, "other.lora_magnitude_vector: unexpected"),
    "twice": (both, "unexpected beside"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "model with DoRA"])
def test_a_bad_magnitude_is_named_and_changes_nothing(adapted, change, match, base, tmp_path):
    in_peft(base).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    model = ours(base) if adapted else base
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        load_adapter(model, tmp_path)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_magnitude_that_the_config_does_not_ask_for(base, tmp_path):
    in_peft(base).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(ValueError, match=r"lin.lora_magnitude_vector: unexpected, .*no use_dora"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("dora", [True, False], ids=["the adapter has it", "the model has it"])
def test_model_and_adapter_have_to_agree(dora, base, tmp_path):
    save_adapter(ours(base, use_dora=dora), tmp_path)
    model = ours(base, use_dora=not dora)
    with pytest.raises(ValueError, match=f"use_dora={not dora} here, the adapter {dora}"):
        load_adapter(model, tmp_path)


def test_dora_of_an_embedding_is_refused(base, tmp_path):
    in_peft(base, target_modules=["lin", "embed"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora: only linears have it, embed is embedding"):
        load_adapter(base, tmp_path)


def test_a_named_adapter_has_no_magnitudes(base, tmp_path):
    in_peft(base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector: only a single adapter"):
        load_adapter(base, tmp_path, adapter="a")


def test_layers_with_dora_and_without_do_not_fit_one_file(base, tmp_path):
    model = copy.deepcopy(base)
    apply_lora(model, **{**LORA, "target_modules": ["lin"]})
    apply_lora(model, r=2, lora_alpha=3, target_modules=["mix"])
    with pytest.raises(ValueError, match="mix: has no use_dora, and others do"):
        save_adapter(model, tmp_path)


def test_a_magnitude_that_is_not_finite_is_not_saved(base, tmp_path):
    model = ours(base)
    model.lin.lora_magnitude.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"lin.lora_magnitude_vector is not finite"):
        save_adapter(model, tmp_path)


def test_loralib_has_no_dora(base, tmp_path, capsys):
    model = ours(base)
    save_adapter(model, tmp_path / "peft")
    torch.save(lora_state_dict(model), tmp_path / "loralib.pt")
    arguments = ["convert", str(tmp_path / "peft"), str(tmp_path / "new.pt")]
    assert main(arguments) != 0
    assert "use_dora" in capsys.readouterr().err
    arguments = ["convert", str(tmp_path / "loralib.pt"), str(tmp_path / "new")]
    arguments += ["--lora-alpha", "3"]
    assert main(arguments) != 0
    assert "lora_magnitude: DoRA's" in capsys.readouterr().err
