"""apply_lora(adapters=...): which layers get which adapters, and how models with them are saved."""

import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_kernels as lora
from tests.model.multi_cases import ADAPTERS, Net, alone, example, model_with_adapters
from tests.model.nets import Net as EveryKind

pytestmark = pytest.mark.usefixtures("seed")


def unchanged(model, before):
    return {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_each_adapter_has_its_own_targets_ranks_and_numbers():
    model = Net()
    hooked = []
    model.blocks[0].up.register_forward_hook(lambda *_: hooked.append(1))
    lora.apply_lora(
        model,
        adapters={
            "a": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"up": 9}},
            "b": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.5, "target_modules": ["up"]},
        },
        target_modules=["up", "down"],
    )
    up, down = model.blocks[1].up, model.blocks[1].down
    assert type(model.blocks[1].query) is nn.Linear
    assert list(up.adapters) == ["a", "b"]
    assert list(down.adapters) == ["a"]
    assert up.adapters["a"] == (9, 8, 0.0, 8 / 3)
    assert down.adapters["a"] == (4, 8, 0.0, 4.0)
    assert up.adapters["b"] == (2, 3, 0.5, 1.5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in model.state_dict() if "lora_" in name}
    assert lora.lora_state_dict(model).keys() == trained
    with lora.route(model, ["a"]):
        model(example("a"))
    assert hooked


def test_a_later_call_adds_adapters_and_keeps_those_there_are():
    model = model_with_adapters()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora.apply_lora(model, adapters={"e": {"r": 3, "lora_alpha": 3}})
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = {name for name in after if name not in before}
    assert {name.rpartition("_")[2] for name in added} == {"e"}
    assert len(added) == 12
    model.requires_grad_(False)
    lora.mark_only_lora_as_trainable(model)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_factors_over_16_bit_weights_are_float32_unless_told():
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = Net().to(torch.bfloat16)
        options = {"autocast_adapter_dtype": autocast}
        lora.apply_lora(model, adapters={"a": {"r": 2, "lora_alpha": 2}}, **options)
        lora.apply_lora(model, adapters={"b": {"r": 2, "lora_alpha": 2}}, **options)
        assert {model.blocks[0].up.factors(name)[0].dtype for name in "ab"} == {dtype}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {}}, "adapters must map at least one name"),
        ({"adapters": ["a"]}, "adapters must map at least one name"),
        ({"adapters": {"x.y": {"r": 2, "lora_alpha": 2}}}, "without '.', got 'x.y'"),
        ({"adapters": {"a": {"r": 2}}}, r"adapters\['a'\] must be a mapping with r and lora_alpha"),
        ({"adapters": {"a": {"r": 2, "lora_alpha": 1, "bias": "all"}}}, "takes r, .*got 'bias'"),
        ({"adapters": {"a": {"r": 0, "lora_alpha": 1}}}, r"r must be in \[1,"),
        (
            {"adapters": {"a": {"r": 2, "lora_alpha": 1, "target_modules": ["none"]}}},
            r"adapters\['a'\]: target_modules=\['none'\] matches no module",
        ),
        ({"r": 8}, "r cannot be given with adapters: give it to each, got 8"),
        ({"bias": "all"}, "bias cannot be given with adapters: all adapters share the base model"),
        ({"modules_to_save": ["head"]}, "modules_to_save cannot be given"),
        ({"merge_weights": True}, "merge_weights cannot be given with adapters: nothing merges"),
        ({"target_modules": ["query", "conv1"]}, r"conv1 \(Conv1d\) cannot get several adapters"),
    ],
)
def test_bad_arguments_raise_and_change_nothing(options, message):
    model = EveryKind()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    options = {"adapters": {"ok": {"r": 2, "lora_alpha": 2}}, **options}
    if "target_modules" not in options:
        options["target_modules"] = ["query"]
    with pytest.raises(ValueError, match=message):
        lora.apply_lora(model, **options)
    assert unchanged(model, before)


def test_an_adapter_added_twice_is_named_and_changes_nothing():
    model = model_with_adapters()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    new = {"r": 2, "lora_alpha": 2}
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        lora.apply_lora(model, adapters={"new": new, "a": new})
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="the model has the adapters 'a', 'b', 'c', 'd'"):
        lora.apply_lora(model, r=2, lora_alpha=2)
    with pytest.raises(ValueError, match="LoRA layers of one adapter"):
        lora.apply_lora(lora.apply_lora(Net(), r=2, lora_alpha=2), adapters={"a": new})


# ---- files, merging, report ----


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_each_adapter_is_saved_as_one_that_peft_and_load_adapter_open(name, tmp_path):
    model, x = model_with_adapters(torch.float64).eval(), example("a", torch.float64)
    lora.save_adapter(model, tmp_path, adapter=name)
    with lora.route(model, [name]):
        y = model(x)
    ours = lora.load_adapter(alone(model, None), tmp_path).eval()
    torch.testing.assert_close(ours(x), y)
    theirs = PeftModel.from_pretrained(alone(model, None), tmp_path).eval()
    torch.testing.assert_close(theirs(x), y)
    wrapped = {path for path, m in ours.named_modules() if isinstance(m, lora.LoRALinear)}
    assert wrapped == {
        path for path, m in model.named_modules() if name in getattr(m, "adapters", ())
    }
    merged = Net().double()
    merged.load_state_dict(lora.merged_state_dict(model, adapter=name))
    torch.testing.assert_close(merged(x), y)


@pytest.mark.parametrize("function", [lambda m, **o: lora.save_adapter(m, "never", **o),
                                      lora.merged_state_dict])  # fmt: skip
def test_one_adapter_of_several_has_to_be_named(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_with_adapters()
    with pytest.raises(ValueError, match="give adapter, one of 'a', 'b', 'c', 'd'"):
        function(model)
    with pytest.raises(ValueError, match="no adapter is called 'z'; the model has 'a'"):
        function(model, adapter="z")
    with pytest.raises(ValueError, match="has no named adapters"):
        function(lora.apply_lora(Net(), r=2, lora_alpha=2), adapter="a")
    assert not list(tmp_path.iterdir())


def test_a_file_loads_under_a_name_new_or_known(tmp_path):
    model, x = model_with_adapters().eval(), example("ac")
    for name in "ac":
        lora.save_adapter(model, tmp_path / name, adapter=name)
    with lora.route(model, ["a", "c"]):
        y = model(x)
    fresh = alone(model, None).eval()
    for name in "ac":
        assert lora.load_adapter(fresh, tmp_path / name, adapter=f"new_{name}") is fresh
    with lora.route(fresh, ["new_a", "new_c"]):
        assert torch.equal(fresh(x), y)
    assert fresh.blocks[0].up.adapters["new_c"] == model.blocks[0].up.adapters["c"]
    assert "new_c" not in fresh.blocks[0].down.adapters
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model, "c"):
            parameter.zero_()
    lora.load_adapter(model, tmp_path / "c", adapter="c")
    with lora.route(model, ["a", "c"]):
        assert torch.equal(model(x), y)


def test_a_file_that_does_not_fit_a_named_adapter_changes_nothing(tmp_path):
    model = model_with_adapters()
    for name in "ac":
        lora.save_adapter(model, tmp_path / name, adapter=name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lora_A.*: b has rank 8 here, the file 4"):
        lora.load_adapter(model, tmp_path / "a", adapter="b")
    with pytest.raises(ValueError, match=r"b has factors for 'blocks.0.down', file does not"):
        lora.load_adapter(model, tmp_path / "c", adapter="b")
    with pytest.raises(ValueError, match=r"without '\.', got 'x\.y'"):
        lora.load_adapter(model, tmp_path / "c", adapter="x.y")
    single = lora.apply_lora(Net(), r=2, lora_alpha=2)
    with pytest.raises(ValueError, match="LoRA layers of one adapter"):
        lora.load_adapter(single, tmp_path / "c", adapter="c")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "function", [lora.merge_lora, lora.unmerge_lora, lora.use_merged_state_dicts]
)
def test_a_model_with_several_adapters_is_not_merged(function):
    model = model_with_adapters()
    with pytest.raises(ValueError, match=r"several adapters.*merged_state_dict\(model, adapter="):
        function(model)
    assert model.training


def test_the_report_says_adapters_and_ranks():
    rows = {row.name: row for row in lora.report(model_with_adapters())}
    up, down = rows["blocks.0.up"], rows["blocks.1.down"]
    assert up.kind == "MultiLoRALinear"
    assert up.ranks == (4, 8, 5, 16)
    assert up.fused
    assert "adapters a (r=4), b (r=8), c (r=5), d (r=16)" in up.reason
    assert down.ranks == (4, 8, 16)
    assert down.weight == (24, 48)
