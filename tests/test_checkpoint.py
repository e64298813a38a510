"""lora_state_dict, merged_state_dict, save_adapter and load_adapter, against loralib and PEFT."""

import copy
import json
import math
import pickle
import warnings

import loralib
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


from lora_kernels import apply_lora, mark_only_lora_as_trainable
from lora_kernels import (
    load_adapter,
    lora_state_dict,
    merged_state_dict,
    save_adapter,
)
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv2d
from lora_kernels.layers.embedding import LoRAEmbedding
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.layers.merged_linear import LoRAMergedLinear
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

KINDS = ["embed", "lin", "mix", "conv1", "conv2", "conv3"]


class Net(nn.Module):
    """Every kind of layer in a row: ids [B, 5] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = Conv1D(12, 8)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=1)
        self.conv3 = nn.Conv3d(1, 4, (1, 2, 3), padding="same")
        self.classifier = nn.Linear(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.mix(self.norm(self.lin(self.embed(ids)))))  # [B, 5, 12]
        x = torch.tanh(self.conv1(x.transpose(1, 2)))  # [B, 8, 5]
        x = torch.tanh(self.conv2(x.unflatten(1, (2, 4))))  # [B, 6, 3, 6]
        x = torch.tanh(self.conv3(x.unsqueeze(1)))  # [B, 4, 6, 3, 6]
        return self.classifier(x.mean((2, 3, 4)))


def randomise(model):
    """Trained values: everything that trains moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def adapted(base, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": KINDS, **options}
    return randomise(apply_lora(copy.deepcopy(base), **options))


def with_peft(base, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": KINDS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself and says so
        return randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))


def load_in_peft(base, directory):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    return model.eval()


def assert_same(actual, expected, dtype=torch.float64):
    torch.testing.assert_close(actual, expected, rtol=64 * torch.finfo(dtype).eps,
                               atol=64 * torch.finfo(dtype).eps)  # fmt: skip


def assert_equal_states(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def assert_same_files(left, right):
    config = "adapter_config.json"
    assert json.loads((left / config).read_text()) == json.loads((right / config).read_text())
    with (
        safe_open(left / "adapter_model.safetensors", "pt") as one,
        safe_open(right / "adapter_model.safetensors", "pt") as other,
    ):
        assert one.metadata() == other.metadata()
        assert sorted(one.keys()) == sorted(other.keys())
        for key in one.keys():  # noqa: SIM118
            assert torch.equal(one.get_tensor(key), other.get_tensor(key)), key


@pytest.fixture
def ids(seed, device):
    return torch.randint(0, 11, (4, 5), device=device)


@pytest.fixture
def base(seed, device):
    return Net().double().to(device)


# ---- PEFT's format, both ways ----

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"conv2": 3, "embed": 5, "^lin": 1},
        "alpha_pattern": {"mix": 7, "conv.": 1.5},
    },
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["classifier", "norm"]},
    "everything": {
        "use_rslora": True,
        "rank_pattern": {"conv3": 3},
        "alpha_pattern": {"lin": 9},
        "bias": "all",
        "modules_to_save": ["classifier"],
        "lora_dropout": 0.5,
    },
    "regex": {"target_modules": r"(lin|conv\d)"},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_peft_saves_loads_here_and_gives_the_same_outputs(case, base, ids, tmp_path):
    theirs = with_peft(base, **OPTIONS[case]).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(ours.eval()(ids), theirs(ids))
    opened = {n for n, p in apply_lora(copy.deepcopy(base), r=2, lora_alpha=4,
              **{"target_modules": KINDS, **OPTIONS[case]}).named_parameters()
              if p.requires_grad}  # fmt: skip
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == opened


@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_saved_here_loads_in_peft_and_gives_the_same_outputs(case, base, ids, tmp_path):
    ours = adapted(base, **OPTIONS[case]).eval()
    save_adapter(ours, tmp_path)
    assert_same(load_in_peft(base, tmp_path)(ids), ours(ids))


@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_saved_here_loads_here_exactly(case, base, ids, tmp_path):
    ours = adapted(base, **OPTIONS[case])
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert_equal_states(again, ours)
    for (name, p), q in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
    for path, layer in ours.named_modules():
        if isinstance(layer, LoRALayer):
            other = again.get_submodule(path)
            assert type(other) is type(layer)
            assert other.r == layer.r
            assert math.isclose(other.lora_alpha, layer.lora_alpha, rel_tol=1e-14)
            assert math.isclose(other.scaling, layer.scaling, rel_tol=1e-14)
            if path != "embed":
                assert other.lora_dropout.p == layer.lora_dropout.p
    assert_same(again.eval()(ids), ours.eval()(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_16_bit_base_keeps_its_adapters_values(dtype, autocast, base, ids, tmp_path):
    base = base.to(dtype)
    ours = adapted(base, target_modules=["lin", "mix"], autocast_adapter_dtype=autocast).eval()
    save_adapter(ours, tmp_path)
    theirs = load_in_peft(base, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    key = "lin.lora_A.weight"
    stored = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{key}"]
    assert stored.dtype == (torch.float32 if autocast else dtype)
    assert again.lin.lora_A.dtype == torch.float32
    assert torch.equal(again.lin.lora_A, ours.lin.lora_A.float())
    assert torch.equal(theirs.base_model.model.lin.lora_A["default"].weight, again.lin.lora_A)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again.eval()(ids), theirs(ids), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_models_travel_both_ways(name, seed, device, tmp_path):
    build, options = TRANSFORMERS[name]
    base = build().double().to(device).eval()
    ids = torch.randint(0, 13, (2, 5), device=device)
    theirs = with_peft(base, **options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same(ours(ids).logits, theirs(ids).logits)
    save_adapter(ours, tmp_path / "ours")
    assert_same(load_in_peft(base, tmp_path / "ours")(ids).logits, theirs(ids).logits)


TRANSFORMERS = {
    # PEFT adds "classifier" and "score" for a sequence classifier; the model has only the first.
    "bert": (tiny_bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "gpt2": (tiny_gpt2, {"target_modules": "all-linear", "bias": "lora_only"}),
    # PEFT stores the base weight of a wrapped embed_tokens, too.
    "llama": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens", "down_proj"]}),
}


def test_the_adapter_of_a_resized_vocabulary_brings_its_embedding(seed, device, tmp_path):
    model = tiny_llama().to(device)
    theirs = with_peft(model, target_modules=["q_proj"])
    nn.init.normal_(theirs.base_model.model.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = load_adapter(model, tmp_path)
    assert torch.equal(ours.model.embed_tokens.weight,
                       theirs.base_model.model.model.embed_tokens.weight)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["mix"]},
        {"exclude_modules": r"conv\d"},
        {"target_modules": ["query"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_peft_adapters_that_leave_modules_out_load(options, seed, device, tmp_path):
    base = (tiny_bert() if "layers_to_transform" in options else Net()).to(device)
    theirs = with_peft(base, **options).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path).eval()
    theirs_found = {
        path.removeprefix("base_model.model.")
        for path, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {p for p, m in ours.named_modules() if isinstance(m, LoRALayer)} == theirs_found


# ---- layers that PEFT has not ----


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    ("enable_lora", "out_splits"),
    [([True, False, True], None), ([True, True, True], [6, 3, 3]), ([False, True], [5, 7])],
)
def test_merged_linear_is_exact_in_peft_and_comes_back(
    fan_in_fan_out, enable_lora, out_splits, seed, device, tmp_path
):
    base = nn.Sequential(Conv1D(12, 8) if fan_in_fan_out else nn.Linear(8, 12)).double().to(device)
    layer = LoRAMergedLinear.from_linear(
        copy.deepcopy(base[0]), r=3, lora_alpha=5, enable_lora=enable_lora, out_splits=out_splits
    )
    ours = nn.Sequential(layer)
    mark_only_lora_as_trainable(ours)
    randomise(ours)
    save_adapter(ours, tmp_path)
    x = torch.randn(4, 8, dtype=torch.float64, device=device)
    assert_same(load_in_peft(base, tmp_path)(x), ours(x))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert type(again[0]) is LoRAMergedLinear
    assert_equal_states(again, ours)
    assert again[0].enable_lora == layer.enable_lora
    assert again[0].out_splits == layer.out_splits
    assert (again[0].r, again[0].lora_alpha, again[0].scaling) == (3, 5, 5 / 3)
    assert torch.equal(again(x), ours(x))


def test_a_merged_linear_that_peft_saved_is_a_linear(seed, device, tmp_path):
    base = nn.Sequential(nn.Linear(8, 12)).double().to(device)
    ours = nn.Sequential(
        LoRAMergedLinear.from_linear(copy.deepcopy(base[0]), r=3, enable_lora=[True, False])
    )
    save_adapter(randomise(ours), tmp_path / "ours")
    load_in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert type(again[0]) is LoRALinear
    with pytest.raises(ValueError, match=r"0\.lora_A\.weight.*LoRAMergedLinear"):
        load_adapter(ours, tmp_path / "theirs")


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 1),
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv2d(4, 6, (3, 1)),
        nn.Conv2d(4, 6, 2, padding_mode="reflect"),
        nn.Conv3d(2, 4, 2),
        nn.Conv3d(2, 4, (3, 1, 2), padding=(1, 0, 1)),
    ],
    ids=str,
)
def test_convolutions_travel_both_ways_and_come_back(conv, r, seed, device, tmp_path):
    base = nn.Sequential(conv).double().to(device)
    ours = adapted(base, r=r, lora_alpha=3, target_modules=["0"])
    save_adapter(ours, tmp_path / "ours")
    x = torch.randn(2, conv.in_channels, *[5] * (conv.weight.dim() - 2), device=device).double()
    assert_same(load_in_peft(base, tmp_path / "ours")(x), ours(x))
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert_equal_states(again, ours)
    assert (again[0].r, again[0].lora_alpha, again[0].scaling) == (r, 3, 3 / r)

    theirs = with_peft(base, r=r, lora_alpha=3, target_modules=["0"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same(ours(x), theirs(x))
    first, *rest = conv.kernel_size
    assert ours[0].r == math.ceil(r * math.prod(rest) / first)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 6, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
    ids=str,
)
def test_convolutions_that_peft_cannot_express_raise_both_ways(conv, reason, seed, tmp_path):
    base = nn.Sequential(conv)
    with pytest.raises(ValueError, match=f"0: .*{reason}"):
        save_adapter(adapted(base, target_modules=["0"]), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with_peft(base, target_modules=["0"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"safetensors.*0.*{reason}"):
        load_adapter(base, tmp_path / "theirs")
    assert type(base[0]) is type(conv)


def test_a_dilated_convolution_of_one_tap_travels(seed, tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 6, 1, dilation=2)).double()
    ours = adapted(base, target_modules=["0"])
    save_adapter(ours, tmp_path)
    x = torch.randn(2, 4, 5, 5).double()
    assert_same(load_in_peft(base, tmp_path)(x), ours(x))


# ---- the files ----


def test_the_config_is_read_off_the_layers(base, tmp_path):
    ours = apply_lora(base, r=2, lora_alpha=4, target_modules=["lin"])
    ours.mix = LoRALinear.from_linear(base.mix, r=3, lora_alpha=6, lora_dropout=0.25)
    ours.lin.scaling = 10.0
    ours.lin.lora_dropout.p = 0.25
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] is None
    assert config["target_modules"] == ["lin", "mix"]
    assert config["fan_in_fan_out"] is True
    assert config["lora_dropout"] == 0.25
    assert (config["r"], config["rank_pattern"]) == (2, {"^mix": 3})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (20.0, {"^mix": 6})
    assert config["modules_to_save"] is None
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_base_models_name_is_kept(tmp_path):
    model = tiny_bert()
    model.config._name_or_path = "some/model"
    save_adapter(apply_lora(model, r=1, lora_alpha=1, target_modules=["query"]), tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "some/model"


def test_a_path_that_ends_other_paths_means_itself_alone(seed, tmp_path):
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "deep": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    ours = adapted(base, target_modules=r"lin")
    save_adapter(ours, tmp_path)
    assert type(load_adapter(copy.deepcopy(base), tmp_path)["deep"]["lin"]) is nn.Linear
    theirs = load_in_peft(base, tmp_path).base_model.model
    assert type(theirs["deep"]["lin"]) is nn.Linear


def test_a_saved_module_whose_name_ends_another_loads_in_peft(seed, tmp_path):
    base = nn.ModuleDict(
        {"head": nn.Linear(4, 4), "pre_head": nn.Linear(4, 4), "lin": nn.Linear(4, 4)}
    )
    ours = adapted(base, target_modules=["lin"], modules_to_save=["head"])
    save_adapter(ours, tmp_path)
    theirs = load_in_peft(base, tmp_path).base_model.model
    x = torch.randn(2, 4)
    for name in ("head", "pre_head"):
        assert torch.equal(theirs[name](x), ours[name](x))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again["head"].weight, ours["head"].weight)


def test_a_lora_layer_whose_name_ends_like_a_saved_module_stays_one(seed, tmp_path):
    base = nn.ModuleDict({"head": nn.Linear(4, 4), "pre_head": nn.Linear(4, 4)})
    ours = adapted(base, target_modules="all-linear", modules_to_save=["head"])
    save_adapter(ours, tmp_path)
    assert_equal_states(load_adapter(copy.deepcopy(base), tmp_path), ours)
    assert_equal_states(load_adapter(copy.deepcopy(ours), tmp_path), ours)


def test_saved_modules_are_named_at_save_time_too(base, tmp_path):
    ours = adapted(base)
    nn.init.normal_(ours.classifier.weight)
    save_adapter(ours, tmp_path, modules_to_save="classifier")
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again.classifier.weight, ours.classifier.weight)


def test_buffers_of_saved_modules_travel(seed, tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ours = adapted(base, target_modules=["0"], modules_to_save=["1"])
    ours(torch.randn(3, 4))
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert_equal_states(again, ours)
    assert again[1].num_batches_tracked == 1


def test_biases_of_other_names_travel_with_bias_all(seed, tmp_path):
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    ours = adapted(base, target_modules=["lin"], bias="all")
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert_equal_states(again, ours)


def test_saving_leaves_nothing_but_the_two_files_and_what_was_there(base, tmp_path):
    (tmp_path / "optimizer.pt").write_text("mine")
    save_adapter(adapted(base), tmp_path)
    save_adapter(adapted(base), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["write", "value"])
def test_an_error_while_saving_leaves_the_earlier_adapter(broken, base, tmp_path, monkeypatch):
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


def test_saving_what_is_no_lora_model_raises(tmp_path):
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


def test_saving_while_merged_writes_the_same_files(base, tmp_path):
    ours = adapted(base)
    save_adapter(ours, tmp_path / "train")
    save_adapter(ours.eval(), tmp_path / "eval")
    assert_same_files(tmp_path / "train", tmp_path / "eval")


# ---- loading ----


@pytest.mark.parametrize("training", [True, False])
def test_loading_keeps_the_mode_and_merges_in_eval(training, base, ids, tmp_path):
    ours = adapted(base).eval()
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base).train(training), tmp_path)
    assert all(module.training == training for module in again.modules())
    assert all(m.merged != training for m in again.modules() if isinstance(m, LoRALayer))
    assert_same(again(ids), ours(ids))
    assert torch.equal(again.train().lin.weight, base.lin.weight)
    unmerged = load_adapter(copy.deepcopy(base).eval(), tmp_path, merge_weights=False)
    assert not any(m.merged for m in unmerged.modules() if isinstance(m, LoRALayer))


@pytest.mark.parametrize("training", [True, False])
def test_loading_into_a_model_with_lora_takes_effect_at_once(training, base, ids, tmp_path):
    ours = adapted(base, lora_alpha=4, bias="all", modules_to_save=["classifier"]).eval()
    save_adapter(ours, tmp_path)
    other = adapted(base, lora_alpha=32).train(training)
    parameters = {name: (id(p), p.requires_grad) for name, p in other.named_parameters()}
    other(ids)
    assert load_adapter(other, tmp_path) is other
    assert_same(other(ids), ours(ids))
    assert {n: (id(p), p.requires_grad) for n, p in other.named_parameters()} == parameters
    save_adapter(other, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path)


def test_what_trains_is_known_to_copies_and_pickles(base, tmp_path):
    ours = adapted(base, bias="lora_only", modules_to_save=["classifier"])
    save_adapter(ours, tmp_path / "ours")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        save_adapter(copied.requires_grad_(False), tmp_path / "copy")
        assert_same_files(tmp_path / "copy", tmp_path / "ours")


# ---- lora_state_dict ----


def both_libraries():
    class Ours:
        Linear, MergedLinear = LoRALinear, LoRAMergedLinear
        Embedding, Conv2d = LoRAEmbedding, LoRAConv2d

    def build(lora):
        return nn.ModuleDict(
            {
                "lin": lora.Linear(4, 4, r=2),
                "plain": nn.Linear(4, 4),
                "qkv": lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True], bias=False),
                "embed": lora.Embedding(5, 4, r=2),
                "norm": nn.LayerNorm(4),
            }
        )

    return build(Ours), build(loralib)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_state_dict_is_loralibs_and_travels_both_ways(bias, seed):
    ours, theirs = both_libraries()
    found, expected = lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert sorted(found) == sorted(expected)
    ours.load_state_dict(expected, strict=False)
    for key, value in lora_state_dict(ours, bias).items():
        assert torch.equal(value, expected[key]), key
    assert not theirs.load_state_dict(found, strict=False).unexpected_keys


def test_lora_state_dict_holds_saved_modules_and_biases_of_convolutions(base):
    ours = adapted(base, target_modules=["conv2"], modules_to_save=["classifier"])
    keys = {"conv2.lora_A", "conv2.lora_B", "classifier.weight", "classifier.bias"}
    assert set(lora_state_dict(ours)) == keys
    assert set(lora_state_dict(ours, "lora_only")) == keys | {"conv2.conv.bias"}
    assert set(lora_state_dict(ours, modules_to_save=["norm"])) == keys | {
        "norm.weight", "norm.bias",
    }  # fmt: skip


def test_lora_state_dict_goes_by_the_last_part_of_a_name():
    model = nn.ModuleDict(
        {
            "lora_encoder": nn.Linear(2, 2),
            "relative_attention_bias": nn.Embedding(3, 2),
            "lin": LoRALinear(2, 2, r=1),
        }
    )
    assert set(lora_state_dict(model)) == {"lin.lora_A", "lin.lora_B"}
    assert set(lora_state_dict(model, "all")) == {
        "lin.lora_A", "lin.lora_B", "lin.bias", "lora_encoder.bias",
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match="'some'"):
        lora_state_dict(model, "some")


def test_lora_state_dict_restores_a_trained_model(base, ids):
    ours = adapted(base, bias="all", modules_to_save=["classifier"]).eval()
    again = apply_lora(copy.deepcopy(base), r=2, lora_alpha=4, target_modules=KINDS)
    again.load_state_dict(lora_state_dict(ours, "all"), strict=False)
    assert_equal_states(again, ours)
    assert torch.equal(again.eval()(ids), ours(ids))


# ---- merged_state_dict ----


@pytest.mark.parametrize("training", [True, False])
def test_merged_state_dict_is_the_plain_models(training, base, ids):
    ours = adapted(base, bias="all", modules_to_save=["classifier"]).train(training)
    merged = merged_state_dict(ours)
    assert list(merged) == list(base.state_dict())
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged)
    assert torch.equal(plain(ids), ours.eval()(ids))


def test_merged_state_dict_of_hand_made_layers(seed, device):
    ours = nn.Sequential(
        LoRAMergedLinear(8, 12, r=2, enable_lora=[True, False], fan_in_fan_out=True),
        LoRALinear(12, 4, bias=False),
        ConvLoRA(nn.Conv1d, 4, 2, 1),
    ).to(device)
    randomise(ours)
    plain = nn.Sequential(Conv1D(12, 8), nn.Linear(12, 4, bias=False), nn.Conv1d(4, 2, 1))
    plain.to(device).load_state_dict(merged_state_dict(ours))
    x = torch.randn(4, 3, 8, device=device)
    ours.eval()
    assert torch.equal(plain[1](plain[0](x)), ours[1](ours[0](x)))


def test_merged_state_dict_is_right_on_both_sides_of_a_tie(seed):
    model = tiny_gpt2().eval()
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    ours = adapted(model, target_modules=["wte"]).eval()
    merged = merged_state_dict(ours)
    assert not torch.equal(merged["transformer.wte.weight"], merged["lm_head.weight"])
    untied.load_state_dict(merged)
    ids = torch.randint(0, 13, (2, 5))
    torch.testing.assert_close(untied(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-6)


def test_merged_state_dict_keeps_a_shared_module_shared(seed):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    merged = merged_state_dict(adapted(model, target_modules=["0"]))
    assert merged["0.weight"] is merged["2.weight"]


def test_merged_state_dict_refuses_an_embedding_that_would_limit_its_rows():
    model = nn.Sequential(LoRAEmbedding(5, 4, r=1, max_norm=1.0))
    with pytest.raises(ValueError, match=r"0: .*max_norm"):
        merged_state_dict(model)


def test_files_hold_no_views_of_the_model(base, tmp_path):
    ours = adapted(base)
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    before = again.lin.lora_A.clone()
    save_file({key: tensor + 1 for key, tensor in stored.items()}, path)
    assert torch.equal(again.lin.lora_A, before)
