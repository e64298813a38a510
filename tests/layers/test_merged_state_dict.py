"""State dicts with merged weights: loralib's are recognised, and given and taken if asked."""

import copy
import pickle
import warnings
from collections import OrderedDict

import loralib
import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConv1d, LoRALinear, LoRAMergedLinear, use_merged_state_dicts

IN_BOTH = {
    "linear": lambda lib: lib.Linear(8, 6, r=2, lora_alpha=3),
    "fan_in_fan_out": lambda lib: lib.Linear(8, 6, r=2, fan_in_fan_out=True),
    "merged_linear": lambda lib: lib.MergedLinear(8, 6, r=2, enable_lora=[True, False, True]),
    "embedding": lambda lib: lib.Embedding(9, 6, r=2, lora_alpha=4),
    "conv2d": lambda lib: lib.Conv2d(2, 4, 3, r=2),
}
in_both = pytest.mark.parametrize("make", IN_BOTH.values(), ids=IN_BOTH.keys())
OWN = {
    "unequal groups": lambda **kw: LoRAMergedLinear(
        8, 12, r=2, enable_lora=[True, False, True], out_splits=(6, 2, 4), **kw
    ),
    "conv1d": lambda **kw: LoRAConv1d(4, 4, 3, r=2, groups=2, **kw),
}


def saved_by_loralib(make, seed, *, training=False):
    """The state dict of a model of loralib in this mode, and its weight without the update.

    It is without the metadata, as safetensors and scripts that copy entries leave it.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(make(loralib)).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    key = next(name for name in model.state_dict() if name.endswith("weight"))
    base = model.state_dict()[key].clone()
    model.train(training)
    return {name: value.clone() for name, value in model.state_dict().items()}, key, base


def build(make, seed):
    torch.manual_seed(seed)
    return nn.Sequential(make(lora_kernels)).double()


def complete(model):
    """The weight with the update in it."""
    return model[0].merged_weight()


def load(model, state, **options):
    """Loads; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(state, **options)
    return [str(warning.message) for warning in caught]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)  # of numbers near one


# ---- recognised ----


@in_both
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_merged_weight_beside_its_base_is_recognised(make, training, assign, asked, seed):
    state, key, base = saved_by_loralib(make, seed)
    merged = state[key].clone()
    model = build(make, seed).train(training)
    with torch.no_grad():
        model.get_parameter(key).copy_(base)
    use_merged_state_dicts(model, asked)
    said = load(model, state, assign=assign)
    assert_same(model.state_dict()[key] if training or not asked else base, base)
    assert_same(complete(model), merged)
    assert torch.equal(state[key], merged)
    if training or not asked:
        assert len(said) == 1
        assert "have the update of its lora_A and lora_B in them" in said[0]
    else:
        assert not said


@in_both
def test_recognised_in_bfloat16(make, seed):
    state, key, base = saved_by_loralib(make, seed)
    model = build(make, seed).bfloat16()
    with torch.no_grad():
        model.get_parameter(key).copy_(base)
    before = model.state_dict()[key].clone()
    said = load(model, {name: value.bfloat16() for name, value in state.items()})
    assert len(said) == 1
    assert torch.equal(model.state_dict()[key], before)


@pytest.mark.parametrize("off", [0.8, 0.9, 1.1, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_near_the_merged_one_is_not_taken_for_it(off, dtype, seed):
    """A base that was trained along with 16-bit factors may move the same way."""
    layer = LoRALinear(64, 64, r=8, lora_alpha=8, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(4)
    layer.lora_A.data = layer.lora_A.data.bfloat16()
    layer.lora_B.data = torch.randn(64, 8).mul_(0.1).bfloat16()
    state = dict(layer.state_dict())
    state["weight"] = (layer.weight.detach() + off * layer.delta_weight()).to(dtype)
    again = copy.deepcopy(layer)
    assert load(again, state) == []
    assert torch.equal(again.weight, state["weight"])


@in_both
@pytest.mark.parametrize("training", [False, True])
def test_base_weights_load_as_they_are_and_quietly(make, training, seed):
    state, key, base = saved_by_loralib(make, seed, training=True)
    model = build(make, seed).train(training)
    with torch.no_grad():
        model.get_parameter(key).copy_(base)
    assert load(model, state) == []
    assert torch.equal(model.state_dict()[key], base)


@in_both
def test_other_base_weights_are_loaded_and_asked_about_in_eval_mode_alone(make, seed):
    state, key, _ = saved_by_loralib(make, seed)
    model = build(make, seed + 1)
    assert load(model.train(), state) == []
    assert torch.equal(model.state_dict()[key], state[key])
    model = build(make, seed + 1)
    (said,) = load(model.eval(), state)
    assert "use_merged_state_dicts(model)" in said
    assert torch.equal(model.state_dict()[key], state[key])


@in_both
def test_own_state_dict_is_known_to_hold_base_weights(make, seed):
    source, target = build(make, seed).eval(), build(make, seed + 1).eval()
    for model in (source, target):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
    assert load(target, source.state_dict()) == []
    assert_same(complete(target), complete(source))
    # A base weight that looks like a merged one is what the dict says that it is.
    twin = copy.deepcopy(source)
    with torch.no_grad():
        twin[0].base_weight().copy_(complete(source))
    expected = complete(twin)
    assert load(source, twin.state_dict()) == []
    assert_same(complete(source), expected)


def test_shapes_that_do_not_fit_keep_their_error(seed):
    make = IN_BOTH["linear"]
    model, other = build(make, seed).eval(), build(lambda lib: lib.Linear(8, 6, r=4), seed)
    for asked in (False, True):
        use_merged_state_dicts(model, asked)
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.lora_A"):
            model.load_state_dict(dict(other.state_dict()))


def nested(seed):
    """Layers at two depths, with random factors, in float64."""
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.ReLU(), LoRALinear(6, 6, r=2))
    model = nn.Sequential(nn.Linear(8, 6), inner, LoRALinear(6, 6, r=2)).double()
    for layer in (inner[1], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def test_a_load_says_each_thing_once_and_names_the_first_layer(seed):
    model = nested(seed)
    state = dict(model.state_dict())
    merged = {f"{path}.weight": model.get_submodule(path).merged_weight() for path in ("1.1", "2")}
    for _ in range(2):  # each load says it
        (said,) = load(model, {**state, **merged})
        assert said.endswith("The first of them is 1.1.weight.")
    (said,) = load(model, {**state, "2.weight": merged["2.weight"]})
    assert said.endswith("The first of them is 2.weight.")
    other = {key: value + 1 if key in merged else value for key, value in state.items()}
    (said,) = load(model.eval(), other)
    assert said.endswith("The first of them is 1.1.weight.")
    both = {**other, "1.1.weight": merged["1.1.weight"]}
    recognised, asked = load(nested(seed).eval(), both)
    assert recognised.endswith("The first of them is 1.1.weight.")
    assert asked.endswith("The first of them is 2.weight.")


# ---- given and taken ----


@in_both
@pytest.mark.parametrize("assign", [False, True])
def test_a_file_of_loralib_in_eval_mode_gives_its_outputs(make, assign, seed):
    state, key, base = saved_by_loralib(make, seed)
    merged = state[key].clone()
    model = use_merged_state_dicts(build(make, seed + 1).eval())
    assert load(model, state, assign=assign) == []
    assert_same(complete(model), merged)
    assert_same(model[0].base_weight(), base)
    assert torch.equal(state[key], merged)
    assert_same(model.state_dict()[key], merged)
    assert_same(model.train().state_dict()[key], base)


@pytest.mark.parametrize("make", OWN.values(), ids=OWN.keys())
def test_layers_that_loralib_has_not_travel_as_well(make, seed):
    source, target = (use_merged_state_dicts(nn.Sequential(make())).double() for _ in range(2))
    for name, parameter in source.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    expected = complete(source)
    target.eval().load_state_dict(OrderedDict(source.eval().state_dict()))
    assert_same(complete(target), expected)
    assert_same(target[0].base_weight(), source[0].base_weight())


def test_state_dict_in_eval_mode_loads_into_the_plain_network(seed):
    model = nn.Sequential(LoRALinear(8, 8, r=2), nn.ReLU(), LoRALinear(8, 4, r=2)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    use_merged_state_dicts(model)
    model.eval()
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    state = model.state_dict()
    missing = plain.load_state_dict(state, strict=False)
    assert missing.missing_keys == []
    assert_same(plain(x), expected)
    # It is a copy: writing to it changes no weight that the layer uses.
    state["0.weight"].zero_()
    assert_same(model(x), expected)
    use_merged_state_dicts(model, False)
    assert torch.equal(model.state_dict()["0.weight"], model[0].weight)


def test_own_merged_state_dict_is_recognised_by_a_model_that_was_not_asked(seed):
    make = IN_BOTH["linear"]
    source = use_merged_state_dicts(build(make, seed))
    nn.init.normal_(source[0].lora_B)
    target = copy.deepcopy(use_merged_state_dicts(source, False))
    use_merged_state_dicts(source).eval()
    (said,) = load(target, source.state_dict())
    assert "have the update of its lora_A and lora_B in them" in said
    assert_same(complete(target), complete(source))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_and_take_the_same(copied, seed):
    make = IN_BOTH["merged_linear"]
    state, key, _ = saved_by_loralib(make, seed)
    model = copied(use_merged_state_dicts(use_merged_state_dicts(build(make, seed + 1)))).eval()
    load(model, state)
    assert_same(model.state_dict()[key], state[key])
    use_merged_state_dicts(model, False)
    assert torch.equal(model.state_dict()[key], model[0].weight)


def test_a_layer_without_an_update_is_as_ever(seed):
    model = use_merged_state_dicts(nn.Sequential(LoRALinear(4, 4), LoRALinear(4, 4, r=1))).eval()
    assert load(model, model.state_dict()) == []


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="use_merged_state_dicts: Sequential has no LoRA layer"):
        use_merged_state_dicts(nn.Sequential(nn.Linear(2, 2)))
