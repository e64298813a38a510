"""What merged_state_dict and save_adapter say of other LoRA layers, and of ties that come apart.

Of the latter, state_dict() after use_merged_state_dicts, too.
"""

import copy
import json
import warnings

import loralib
import pytest
import torch
from torch import nn

import lora_kernels as lora
from lora_kernels.model.other_layers import other_lora_layers
from tests.adapters.nets import randomise


class OwnLinear(nn.Linear):
    def __init__(self, k, n, r):
        super().__init__(k, n)
        self.lora_A = nn.Parameter(torch.randn(r, k))
        self.lora_B = nn.Parameter(torch.randn(n, r))


class Around(nn.Module):
    """A wrapper with factors the other way round."""

    def __init__(self, linear, r):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(linear.in_features, r))
        self.lora_B = nn.Parameter(torch.randn(r, linear.out_features))


class Holder(nn.Module):
    """A module that has parameters of these names, and is no LoRA layer."""

    def __init__(self, linear, a, b=None):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(a))
        self.lora_B = None if b is None else nn.Parameter(torch.randn(b))


FOREIGN = {
    "linear": (lambda: loralib.Linear(8, 8, r=2), "loralib.layers.Linear"),
    "merged": (
        lambda: loralib.MergedLinear(8, 8, r=2, enable_lora=[True, False]),
        "loralib.layers.MergedLinear",
    ),
    "embedding": (lambda: loralib.Embedding(8, 8, r=2), "loralib.layers.Embedding"),
    "convolution": (lambda: loralib.Conv2d(2, 4, 3, r=2), "loralib.layers.Conv2d"),
    "own": (lambda: OwnLinear(8, 8, 2), "tests.adapters.test_left_out.OwnLinear"),
    "around": (lambda: Around(nn.Linear(8, 6), 2), "tests.adapters.test_left_out.Around"),
}
OTHERS = {
    "r = 0": lambda: loralib.Linear(8, 8),
    "plain": lambda: nn.Linear(8, 8),
    "dict": lambda: nn.ParameterDict(
        {name: torch.randn(4, 4) for name in ("weight", "lora_A", "lora_B")}
    ),
    "one factor": lambda: Holder(nn.Linear(8, 8), (2, 8)),
    "factors of another size": lambda: Holder(nn.Linear(8, 8), (2, 5), (5, 2)),
    "vectors": lambda: Holder(nn.Linear(8, 8), 8, 8),
    "of this package": lambda: Holder(lora.Linear(8, 8, r=2), (2, 8), (8, 2)),
}


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("build", "kind"), FOREIGN.values(), ids=FOREIGN.keys())
def test_layers_that_are_not_of_this_package_are_warned_of_once(build, kind, tmp_path):
    model = nn.Sequential(build(), lora.Linear(8, 8, r=2), build()).requires_grad_(False)
    (message,) = said(lambda: lora.save_adapter(model, tmp_path))
    assert (
        f"save_adapter: these LoRA layers are not of this package, and left out: '0', '2' ({kind})"
        in message
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["1"]
    (message,) = said(lambda: lora.merged_state_dict(model))
    assert f"as they are, lora_A and lora_B among them: '0', '2' ({kind}). Import" in message


@pytest.mark.parametrize(("build", "kind"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_model_of_such_layers_alone_is_told_what_they_are(build, kind, tmp_path):
    model = nn.Sequential(build())
    with pytest.raises(ValueError, match="has no LoRA layer of this package, but '0' ") as error:
        lora.save_adapter(model, tmp_path)
    assert f"({kind}). Import lora_kernels in the place of loralib" in str(error.value)
    (message,) = said(lambda: lora.merged_state_dict(model))
    assert f"'0' ({kind})" in message


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
def test_modules_with_parameters_of_these_names_are_not_warned_of(build, tmp_path):
    model = nn.Sequential(build(), lora.Linear(8, 8, r=2)).requires_grad_(False)
    assert said(lambda: lora.save_adapter(model, tmp_path)) == []
    assert said(lambda: lora.merged_state_dict(model)) == []


def test_every_layer_of_this_package_is_its_own():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(2, 2, 3))
    model = lora.apply_lora(plain, r=2, lora_alpha=4, target_modules=["0", "1", "2"])
    model.append(lora.MergedLinear(4, 4, r=2, enable_lora=[True, False]))
    model.append(lora.MultiLoRALinear(4, 4, {"a": {"r": 2}}))
    assert other_lora_layers(model) is None


def test_such_a_layer_in_a_module_that_is_saved_whole_is_in_the_file(tmp_path):
    model = nn.ModuleDict({"body": lora.Linear(8, 8, r=2), "head": OwnLinear(8, 2, 1)})
    model["body"].bias.requires_grad_(False)
    assert said(lambda: lora.save_adapter(model, tmp_path, modules_to_save=["head"])) == []


# ---- parameters that train and are not written ----


def net(**options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    options = options if "adapters" in options else {"r": 2, "lora_alpha": 4, **options}
    return lora.apply_lora(model, target_modules=["0"], **options)


def test_parameters_that_train_beside_lora_are_named(tmp_path):
    model = net()
    model[2].requires_grad_(True)
    (message,) = said(lambda: lora.save_adapter(model, tmp_path))
    assert "that train are not in the directory: '2.weight', '2.bias'. Name their" in message
    assert said(lambda: lora.save_adapter(model, tmp_path, modules_to_save=["2"])) == []


def test_layers_of_which_nobody_marked_what_trains_are_named(tmp_path):
    model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 3))
    (message,) = said(lambda: lora.save_adapter(model, tmp_path))
    assert "'0.bias', '1.weight', '1.bias'" in message
    lora.mark_only_lora_as_trainable(model)
    assert said(lambda: lora.save_adapter(model, tmp_path)) == []


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["2"]},
        {"use_dora": True}, {"adapters": {name: {"r": 2, "lora_alpha": 4} for name in "ab"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_apply_lora_makes_trainable_is_written(options, tmp_path):
    model = net(**options)
    chosen = {"adapter": "a"} if "adapters" in options else {}
    assert said(lambda: lora.save_adapter(model, tmp_path, **chosen)) == []


def test_a_parametrized_factor_is_written(tmp_path):
    model = net()
    nn.utils.parametrizations.orthogonal(model[0], "lora_A")
    assert said(lambda: lora.save_adapter(model, tmp_path)) == []


def test_parameters_of_a_saved_module_are_written_whatever_their_keys_are(tmp_path):
    model = net(modules_to_save=["2"])

    def rename(module, state_dict, prefix, metadata):
        state_dict[prefix + "kernel"] = state_dict.pop(prefix + "weight")

    model[2].register_state_dict_post_hook(rename)
    assert said(lambda: lora.save_adapter(model, tmp_path)) == []


def test_a_parameter_that_is_tied_to_a_written_one_is_written(tmp_path):
    model = net(modules_to_save=["2"])
    model.append(nn.Linear(8, 3))
    model[3].weight = model[2].weight
    model[3].bias.requires_grad_(False)
    assert said(lambda: lora.save_adapter(model, tmp_path)) == []


# ---- tied weights ----


def tied(output=nn.Linear, **options):
    model = nn.ModuleDict({"emb": lora.Embedding(9, 8, r=2), "out": output(8, 9, **options)})
    if output is nn.Embedding:
        model["out"] = nn.Embedding(9, 8)
    model["out"].weight = model["emb"].weight
    return model


def state_dict(model):
    return lora.use_merged_state_dicts(model.eval()).state_dict()


merging = pytest.mark.parametrize(
    "merge", [lora.merged_state_dict, state_dict], ids=lambda f: f.__name__
)


@merging
@pytest.mark.parametrize(
    ("output", "options"),
    [(nn.Linear, {}), (nn.Embedding, {}), (lora.Linear, {"r": 2}), (lora.Linear, {})],
)
def test_a_tied_weight_that_lora_changes_in_one_place_is_warned_of(output, options, merge, seed):
    model = tied(output, **options)
    nn.init.normal_(model["emb"].lora_A)
    (message,) = said(lambda: merge(model))
    assert message.startswith(f"{merge.__name__}: ")
    assert "differ in the dict" in message
    assert ": emb.weight and out.weight. In a model that ties them" in message


@merging
def test_tied_entries_that_are_equal_are_not_warned_of(merge, seed):
    assert said(lambda: merge(tied())) == []  # lora_A or lora_B holds zeros
    shared = nn.Sequential(lora.Linear(4, 4, r=2))
    shared.append(shared[0])
    randomise(shared)
    assert said(lambda: merge(shared)) == []


@merging
def test_tied_entries_that_hold_nan_in_the_same_places_are_not_warned_of(merge, seed):
    model = tied()
    model["emb"].weight.data[0, 0] = torch.nan
    assert said(lambda: merge(model)) == []


@pytest.mark.parametrize(
    "wrap", [lambda model: model, copy.deepcopy, torch.compile, nn.Sequential],
    ids=["none", "a copy", "compile", "inside another"],
)  # fmt: skip
def test_state_dict_warns_of_parted_ties_while_it_gives_merged_weights(wrap, seed):
    model = lora.use_merged_state_dicts(lora.use_merged_state_dicts(tied()))
    nn.init.normal_(model["emb"].lora_A)
    outer = wrap(model)
    front = next(iter(outer.state_dict())).removesuffix("emb.weight")
    (message,) = said(outer.eval().state_dict)
    assert f": {front}emb.weight and {front}out.weight. In a model" in message
    assert len(said(outer.state_dict)) == 1
    assert said(outer.train().state_dict) == []
    model = next(m for m in outer.modules() if isinstance(m, nn.ModuleDict))
    lora.use_merged_state_dicts(model, False)
    assert said(outer.eval().state_dict) == []


def test_the_merged_entries_are_right_for_a_model_without_the_tie(seed):
    model = tied(bias=True)
    nn.init.normal_(model["emb"].lora_A)
    with pytest.warns(UserWarning, match="one tied weight"):
        merged = lora.merged_state_dict(model)
    plain = nn.ModuleDict({"emb": nn.Embedding(9, 8), "out": nn.Linear(8, 9)})
    plain.load_state_dict(merged)
    assert torch.equal(plain["emb"].weight, model["emb"].merged_weight())
    assert torch.equal(plain["out"].weight, model["out"].weight)


def test_a_tied_weight_on_the_meta_device_is_taken_to_differ():
    with torch.device("meta"):
        model = tied()
    (message,) = said(lambda: lora.merged_state_dict(model))
    assert "one tied weight" in message
