"""load_adapter: into plain models, and into models that have LoRA."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_kernels
from lora_kernels import (
    apply_lora,
    load_adapter,
    lora_state_dict,
    save_adapter,
)
from lora_kernels.layers.base import LoRALayer
from lora_kernels.model.paths import adapted_layers
from tests.adapters.nets import (
    OPTIONS,
    adapted,
    assert_equal_states,
    assert_same,
    assert_same_files,
    with_peft,
)
from tests.adapters.tied import LORA, SAVED, trained
from tests.model import wrapped
from tests.tiny_models import tiny_bert, tiny_llama


@pytest.mark.parametrize("case", OPTIONS)
def test_load_adapter_restores_exactly_what_was_saved(case, base, ids, tmp_path):
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


@pytest.mark.parametrize("training", [True, False])
def test_load_adapter_keeps_the_mode_and_merges_in_eval(training, base, ids, tmp_path):
    ours = adapted(base, merge_weights=True).eval()
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base).train(training), tmp_path, merge_weights=True)
    assert all(module.training == training for module in again.modules())
    assert all(m.merged != training for m in again.modules() if isinstance(m, LoRALayer))
    assert_same(again(ids), ours(ids))
    assert torch.equal(again.train().lin.weight, base.lin.weight)
    unmerged = load_adapter(copy.deepcopy(base).eval(), tmp_path)
    assert not any(m.merged for m in unmerged.modules() if isinstance(m, LoRALayer))


@pytest.mark.parametrize(
    ("training", "merge_weights"), [(True, False), (False, False), (False, True)]
)
def test_load_adapter_takes_effect_at_once_in_a_model_with_lora(
    training, merge_weights, base, ids, tmp_path
):
    ours = adapted(base, lora_alpha=4, bias="all", modules_to_save=["classifier"]).eval()
    save_adapter(ours, tmp_path)
    other = adapted(base, lora_alpha=32, merge_weights=merge_weights).train(training)
    assert other.lin.merged == merge_weights
    parameters = {name: (id(p), p.requires_grad) for name, p in other.named_parameters()}
    other(ids)
    assert load_adapter(other, tmp_path) is other
    assert_same(other(ids), ours(ids))
    assert {n: (id(p), p.requires_grad) for n, p in other.named_parameters()} == parameters
    save_adapter(other, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path)


def test_load_adapter_keeps_no_views_of_the_files(base, tmp_path):
    ours = adapted(base)
    save_adapter(ours, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    again = load_adapter(copy.deepcopy(base), tmp_path)
    before = copy.deepcopy(again.state_dict())
    with path.open("r+b") as file:  # in place: a new file of this name would leave views their own
        file.write(bytes(path.stat().st_size))
    for key, value in again.state_dict().items():
        assert torch.equal(value, before[key]), key


@SAVED
def test_load_adapter_refuses_what_a_tied_model_cannot_hold(saved, tied_base, tmp_path):
    ours = copy.deepcopy(tied_base)
    apply_lora(ours, target_modules=["q_proj"], modules_to_save=saved, **LORA)
    save_adapter(trained(ours), tmp_path)
    tied = apply_lora(copy.deepcopy(tied_base), target_modules=["q_proj"], **LORA)
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: .* is tied to .* in the model"
    ):
        load_adapter(tied, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in tied.state_dict().items())


@wrapped.each_way
@pytest.mark.parametrize("has_lora", [True, False])
def test_load_adapter_looks_through_wrappers(tmp_path, wrap, has_lora, seed):
    base = wrapped.Net()
    model = wrapped.adapted(base, merge_weights=True)
    save_adapter(model, tmp_path)
    again = wrapped.adapted(base, merge_weights=True) if has_lora else copy.deepcopy(base)
    other = wrap(again).eval()
    assert load_adapter(other, tmp_path, merge_weights=True) is other
    x = torch.randn(5, 6)
    assert torch.equal(other(x), model.eval()(x))
    assert all(m.merged for m in other.modules() if isinstance(m, LoRALayer))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_name_of_a_lora_layer_may_end_with_that_of_a_saved_module(bias, seed, tmp_path):
    def plain():
        return nn.ModuleDict({"pre_classifier": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})

    model = lora_kernels.apply_lora(
        plain(), r=2, lora_alpha=4, target_modules=["pre_classifier"], bias=bias,
        modules_to_save=["classifier"],
    )  # fmt: skip
    lora_kernels.save_adapter(model, tmp_path)
    loaded = lora_kernels.load_adapter(plain(), tmp_path)
    for key, value in lora_kernels.lora_state_dict(model, bias).items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("sides", ["saved", "loaded", "both"])
def test_adapters_travel_between_fsdp_and_the_plain_model(sides, seed, tmp_path):
    """FSDP's first version, which hides its names in the state dict and only there."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        base, x = wrapped.Net(), torch.randn(5, 6)
        model = wrapped.adapted(base)
        expected = model(x)
        save_adapter(wrapped.in_fsdp(model) if sides != "loaded" else model, tmp_path / "adapter")
        again = wrapped.adapted(base)
        again = wrapped.in_fsdp(again) if sides != "saved" else again
        assert torch.equal(load_adapter(again, tmp_path / "adapter")(x), expected)
        assert torch.equal(load_adapter(base, tmp_path / "adapter")(x), expected)
        with pytest.raises(ValueError, match=r"blocks.0.up \(Linear\) .* before .* FSDP"):
            load_adapter(wrapped.in_fsdp(wrapped.Net()), tmp_path / "adapter")
    finally:
        torch.distributed.destroy_process_group()


class Own(nn.Module):
    """A model of the user's that calls a part of itself as DDP calls what it wraps."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, wrapped.Net())


@pytest.mark.parametrize("name", ["module", "model"])
def test_load_adapter_takes_what_is_in_front_of_all_paths_off_or_adds_it(name, seed, tmp_path):
    own = Own(name)
    plain = own.get_submodule(name)
    apply_lora(own, r=2, lora_alpha=4, modules_to_save=["head"])
    save_adapter(own, tmp_path / "own")
    for adapter, target in (
        ("own", wrapped.Net()), ("own", Own(name)), ("plain", Own(name)), ("plain", wrapped.Net()),
    ):  # fmt: skip
        if adapter == "plain":
            save_adapter(plain, tmp_path / "plain", ["head"])
        load_adapter(target, tmp_path / adapter)
        loaded = target.get_submodule(name) if isinstance(target, Own) else target
        wrapped.assert_same(lora_state_dict(loaded), lora_state_dict(plain))


def test_load_adapter_takes_the_names_of_wrappers_in_a_file_of_peft(seed, tmp_path):
    base, x = wrapped.Net(), torch.randn(5, 6)
    theirs = with_peft(
        wrapped.with_compiled_parts(copy.deepcopy(base)),
        target_modules=["up", "blocks.0.down"], rank_pattern={"_orig_mod.up": 3},
        modules_to_save=["head"],
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    assert any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    assert {p: layer.r for p, layer in adapted_layers(ours).items()} == {
        "blocks.0.up": 2, "blocks.0.down": 2, "blocks.1.up": 3,
    }  # fmt: skip


def test_load_adapter_warns_of_pattern_keys_that_match_nothing(base, tmp_path):
    with_peft(base, rank_pattern={"typo": 3, "lin": 1}).save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"adapter_config\.json: .*rank_pattern: 'typo'"):
        ours = load_adapter(base, tmp_path)
    assert ours.lin.r == 1


def test_load_adapter_names_the_module_that_the_adapter_is_for(seed, tmp_path):
    """sentence-transformers saves the adapter of the module auto_model of its first module."""
    inner = tiny_bert().bert
    save_adapter(
        apply_lora(copy.deepcopy(inner), target_modules=["query"], **LORA), tmp_path / "inner"
    )
    outer = nn.Sequential(nn.ModuleDict({"auto_model": inner}))
    before = copy.deepcopy(outer.state_dict())
    with pytest.raises(
        ValueError, match=r"get_submodule\('0\.auto_model'\).*model\[0\]\.auto_model"
    ):
        load_adapter(outer, tmp_path / "inner")
    wrapped.assert_same(outer.state_dict(), before)
    load_adapter(outer.get_submodule("0.auto_model"), tmp_path / "inner")


def test_adapters_with_an_embedding_and_a_head_go_into_compiled_ones(seed, tmp_path):
    base = tiny_llama().eval()
    theirs = with_peft(base, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    theirs.eval().save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    model.model.embed_tokens = torch.compile(model.model.embed_tokens, backend="eager")
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    load_adapter(model, tmp_path)
    ids = torch.arange(7)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
    everything = apply_lora(copy.deepcopy(base), target_modules="all-linear", **LORA)
    base.lm_head = torch.compile(base.lm_head, backend="eager")
    apply_lora(base, target_modules="all-linear", **LORA)
    assert list(adapted_layers(base)) == list(adapted_layers(everything))
