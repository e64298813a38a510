"""Adapters of experts: PEFT's target_parameters, both ways, in both orientations."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels import apply_lora, load_adapter, lora_state_dict, save_adapter
from lora_kernels.adapters.formats import peft as peft_format
from lora_kernels.adapters.formats.peft_experts import homes
from tests.experts import EXPERTS, TARGETS, Holder, R, drawn, experts, inputs, up_name, whole

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUMBERS = {"r": R, "lora_alpha": 5}
every_family = pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
PARAMETERS = {"both": [0, 1], "the first": [0], "the second": [1]}
some = pytest.mark.parametrize("which", PARAMETERS.values(), ids=PARAMETERS.keys())


def names(family, which=(0, 1)):
    return [f"experts.{(up_name(family), 'down_proj')[i]}" for i in which]


def in_peft(base, directory, **options):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, **options)
    return model.to(next(base.parameters()).dtype)


def assert_as_near_as_float32(actual, expected):
    """PEFT rounds W + s·B·A once for all rows, this package each product by itself.

    Both are off by some 1e-6 of values near ten. The update of these factors changes them by more
    than 0.01, so one that is lost or read the wrong way round is far outside.
    """
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def run(model, args):
    return model(*args).detach()


def by_peft(base, targets, **options):
    config = peft.LoraConfig(**NUMBERS, target_modules=[], target_parameters=targets, **options)
    return drawn(peft.get_peft_model(copy.deepcopy(base), config))


def change_config(directory, **changes):
    path = directory / CONFIG
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args, **options)


# ---- ours in PEFT, and PEFT's here ----


@every_family
@some
def test_peft_opens_what_is_saved_here(family, which, seed, tmp_path):
    base = Holder(experts(family, torch.float32))
    model = apply_lora(copy.deepcopy(base), **NUMBERS, target_parameters=names(family, which))
    quiet(save_adapter, drawn(model), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(config["target_parameters"]) == sorted(names(family, which))
    inner = {0: ".base_layer"} if len(which) == 2 else {}
    keys = {
        f"base_model.model.experts{inner.get(i, '')}.lora_{ab}.weight" for i in which for ab in "AB"
    }
    assert set(load_file(tmp_path / WEIGHTS)) == keys
    args = inputs(torch.float32)
    actual = run(in_peft(base, tmp_path), args)
    assert_as_near_as_float32(actual, run(model, args))


def test_the_layout_is_experts_slowest_in_lora_a_and_fastest_in_lora_b(seed, tmp_path):
    model = apply_lora(Holder(experts("mixtral", torch.float32)), **NUMBERS,
                       target_parameters=["experts.down_proj"])  # fmt: skip
    save_adapter(drawn(model), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    a, b = (tensors[f"base_model.model.experts.lora_{x}.weight"] for x in "AB")
    for e in range(EXPERTS):
        assert torch.equal(a[e * R : (e + 1) * R], model.experts.lora_A_down_proj[e])
        assert torch.equal(b[:, e::EXPERTS], model.experts.lora_B_down_proj[e])


@every_family
@some
def test_from_peft_and_back_bit_for_bit(family, which, seed, tmp_path):
    base = Holder(experts(family, torch.float32))
    *_, last = targets = names(family, which)
    model = by_peft(base, targets, rank_pattern={last: 2})
    model.save_pretrained(tmp_path / "theirs")
    ours = quiet(load_adapter, copy.deepcopy(base), tmp_path / "theirs")
    args = inputs(torch.float32)
    assert_as_near_as_float32(run(ours, args), run(model, args))
    assert lora_state_dict(ours).keys() == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    quiet(save_adapter, ours, tmp_path / "ours")
    theirs, again = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(theirs[key], again[key]) for key in theirs)
    torch.testing.assert_close(  # the same code on the same bits
        run(in_peft(base, tmp_path / "ours"), args), run(model, args), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_whole_models_with_attention_beside(kind, seed, tmp_path):
    base = whole(kind).eval()
    options = {"target_modules": ["q_proj"], "target_parameters": TARGETS}
    model = apply_lora(
        copy.deepcopy(base), **NUMBERS, **options, alpha_pattern={"layers.1.*down_proj": 11}
    )
    quiet(save_adapter, drawn(model), tmp_path)
    ids = {"input_ids": torch.arange(14).view(2, 7)}
    expected = model(**ids).logits
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_as_near_as_float32(theirs(**ids).logits, expected)
    again = quiet(load_adapter, copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**ids).logits, expected)
    # into a model that has LoRA already
    other = apply_lora(copy.deepcopy(base), **NUMBERS, **options)
    quiet(load_adapter, other, tmp_path)
    assert torch.equal(other(**ids).logits, expected)
    compiled = load_adapter(torch.compile(copy.deepcopy(base), backend="eager"), tmp_path)
    assert torch.equal(compiled(**ids).logits, expected)


def test_some_layers_alone_are_named_by_their_paths(seed, tmp_path):
    base = whole("mixtral").eval()
    targets = ["layers.1.mlp.experts.down_proj"]
    model = drawn(apply_lora(copy.deepcopy(base), **NUMBERS, target_parameters=targets))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    ids = {"input_ids": torch.arange(14).view(2, 7)}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_as_near_as_float32(theirs(**ids).logits, model(**ids).logits)
    assert torch.equal(load_adapter(base, tmp_path)(**ids).logits, model(**ids).logits)


def test_dropout_is_left_out_with_a_warning(seed, tmp_path):
    base = Holder(experts("mixtral", torch.float32))
    options = {**NUMBERS, "lora_dropout": 0.1, "target_parameters": names("mixtral")}
    model = drawn(apply_lora(copy.deepcopy(base), **options))
    with pytest.warns(UserWarning, match="PEFT refuses lora_dropout beside target_parameters"):
        save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.0
    in_peft(base, tmp_path)
    load_adapter(model, tmp_path)
    assert model.experts.lora_dropout.p == 0.1  # a model that has LoRA keeps its own


def test_biases_of_experts_that_train_are_not_lost(seed, tmp_path):
    targets = names("gpt_oss")
    model = apply_lora(Holder(experts("gpt_oss")), **NUMBERS, bias="all", target_parameters=targets)
    assert model.experts.down_proj_bias.requires_grad
    with pytest.raises(ValueError, match=r"experts.gate_up_proj_bias trains.*lora_state_dict"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- older files ----


def as_older(directory):
    """Turns a file of 0.19.1 into one of 0.17, which took in for out in [E, out, in]."""
    tensors = load_file(directory / WEIGHTS)
    older = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            b = tensors[other]
            rank = len(a) // EXPERTS
            older[key] = torch.cat([b[:, e::EXPERTS].T for e in range(EXPERTS)]).contiguous()
            older[other] = torch.empty(a.shape[1], len(a))
            for e in range(EXPERTS):
                older[other][:, e::EXPERTS] = a[e * rank : (e + 1) * rank].T
    save_file(older, directory / WEIGHTS, {"format": "pt"})
    change_config(directory, peft_version=...)


def test_the_older_orientation_is_told_by_its_shapes(seed, tmp_path):
    base = Holder(experts("mixtral", torch.float32))
    model = by_peft(base, names("mixtral"))
    model.save_pretrained(tmp_path)
    as_older(tmp_path)
    args = inputs(torch.float32)
    ours = quiet(load_adapter, base, tmp_path)
    assert_as_near_as_float32(run(ours, args), run(model, args))


@pytest.mark.parametrize(
    ("family", "version", "older"),
    [
        ("mixtral", "0.18.1", True),
        ("mixtral", "0.19.0", True),
        ("mixtral", "0.19.1", False),
        ("mixtral", "0.21.2", False),
        ("gpt_oss", ..., False),
        ("gpt_oss", "0.18.1", False),
        ("gpt_oss", "0.19.0", True),
    ],
)
def test_equal_sizes_are_told_by_the_version(family, version, older, seed, tmp_path):
    """In is out for gate_up_proj alone."""
    base = Holder(experts(family, torch.float32, intermediate_size=8))
    model = by_peft(base, names(family))
    model.save_pretrained(tmp_path)
    if older:
        as_older(tmp_path)
    change_config(tmp_path, peft_version=version)
    ours = quiet(load_adapter, base, tmp_path)
    args = inputs(torch.float32)
    assert_as_near_as_float32(run(ours, args), run(model, args))


def test_equal_sizes_without_a_version_are_named_in_a_warning(seed, tmp_path):
    base = Holder(experts("mixtral", torch.float32, intermediate_size=8))
    model = by_peft(base, names("mixtral"))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, peft_version=...)
    with pytest.warns(RuntimeWarning, match=r"in and out are equal for experts.gate_up_proj, and "):
        ours = load_adapter(base, tmp_path)
    args = inputs(torch.float32)
    assert_as_near_as_float32(run(ours, args), run(model, args))
    save_adapter(ours, tmp_path)
    quiet(load_adapter, ours, tmp_path)  # what is saved here says which it is


# ---- what does not fit ----


def saved(tmp_path, family="mixtral", which=(0, 1)):
    base = Holder(experts(family, torch.float32))
    model = apply_lora(copy.deepcopy(base), **NUMBERS, target_parameters=names(family, which))
    save_adapter(drawn(model), tmp_path)
    return base


def fails(model, directory, words):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_adapter(model, directory)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.experts).__name__ != "LoRAExperts" or "lora_A_down_proj" in str(before)


def test_names_of_no_parameter(seed, tmp_path):
    base = saved(tmp_path)
    change_config(tmp_path, target_parameters=["experts.other"])
    fails(base, tmp_path, r"adapter_config.json: target_parameters=\['experts.other'\] matches no")


def test_a_stack_that_the_file_lacks(seed, tmp_path):
    base = saved(tmp_path, which=[1])
    change_config(tmp_path, target_parameters=names("mixtral"))
    fails(base, tmp_path, "lora_A and lora_B of 'experts.gate_up_proj': missing")


def test_a_stack_that_the_config_lacks(seed, tmp_path):
    base = saved(tmp_path)
    change_config(tmp_path, target_parameters=names("mixtral", [1]))
    fails(base, tmp_path, "unexpected|base_layer")


def test_other_experts(seed, tmp_path):
    saved(tmp_path)
    other = Holder(experts("mixtral", torch.float32, num_local_experts=4))
    fails(
        other, tmp_path, r"lora_A.weight: shape must be \[12, 16\], and .*of 4 experts and rank 3"
    )


def test_another_rank_and_other_stacks_of_a_model_with_lora(seed, tmp_path):
    base = saved(tmp_path)
    for options, words in (
        ({"r": 2, "target_parameters": names("mixtral")}, "LoRA of rank 2 here, the adapter 3"),
        (
            {"r": R, "target_parameters": names("mixtral", [1])},
            "the adapter has LoRA on 'experts.ga",
        ),
    ):
        model = drawn(apply_lora(copy.deepcopy(base), lora_alpha=5, **options))
        fails(model, tmp_path, words)


def test_convert_says_who_reads_it(seed, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters: .*load_adapter\(model"):
        peft_format.read(tmp_path)


def test_homes_nest_in_the_order_of_the_parameters():
    paths = ["a.x", "b.x", "a.y", "a.z"]
    assert homes(paths) == {
        "a.x": "a.base_layer.base_layer", "a.y": "a.base_layer", "a.z": "a", "b.x": "b"
    }  # fmt: skip
