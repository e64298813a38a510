"""apply_lora(target_parameters=...): which parameters it means, and what they become."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import (
    LoRAExperts,
    LoRALinear,
    apply_lora,
    lora_state_dict,
    merged_state_dict,
    report,
)
from tests.experts import CONFIGS, SIZES, TARGETS, Holder, drawn, experts, whole
from tests.op_calls import Calls

both_models = pytest.mark.parametrize("kind", CONFIGS)
NUMBERS = {"r": 3, "lora_alpha": 6}


def kinds(model):
    return {
        path: type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, (LoRAExperts, LoRALinear))
    }


def logits(model):
    return model(input_ids=torch.arange(24).view(2, 12) * 7 % 40).logits


@both_models
def test_experts_alone(kind, seed):
    model = whole(kind)
    plain, keys = logits(model).detach(), set(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_lora(model, **NUMBERS, target_parameters=TARGETS) is model
    assert set(kinds(model).values()) == {"LoRAExperts"}
    assert len(kinds(model)) == 2
    assert {key for key in model.state_dict() if "lora_" not in key} == keys
    # float32 through a whole model, rounded in another order
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == set(lora_state_dict(model))
    assert len(trains) == 8
    drawn(model)
    assert (logits(model) - plain).abs().max() > 1e-3
    merged = whole(kind)
    merged.load_state_dict(merged_state_dict(model))
    # float32 through a whole model: merged weights round anew
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-4)


@both_models
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
def test_a_training_step_runs_the_op_and_reaches_every_factor(kind, checkpointing, seed):
    model = whole(kind).train()
    apply_lora(model, **NUMBERS, target_modules=["q_proj"], target_parameters=TARGETS)
    drawn(model)
    assert sorted(kinds(model).values()) == ["LoRAExperts"] * 2 + ["LoRALinear"] * 2
    ids = torch.arange(24).view(2, 12) * 7 % 40

    def grads():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected = grads()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with Calls() as calls:
        actual = grads()
    assert calls.names.count("lora_grouped_linear_backward") == 4
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        assert torch.equal(actual[name], grad)


def test_all_linear_beside_them(seed):
    model = whole("qwen3_moe")
    options = {**NUMBERS, "target_modules": "all-linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(model, **options, target_parameters=TARGETS)
    assert {"LoRAExperts", "LoRALinear"} == set(kinds(model).values())
    assert "q_proj" in str(kinds(model))
    with pytest.warns(UserWarning, match=r"leaves out stacks.*experts\.down_proj\. LoRA"):
        apply_lora(whole("qwen3_moe"), **options, target_parameters=TARGETS[:1])


@both_models
def test_a_whole_model_compiles_as_one_graph(kind, seed):
    torch._dynamo.reset()
    model = drawn(apply_lora(whole(kind), **NUMBERS, target_parameters=TARGETS))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # the compiler may add in another order
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


@both_models
def test_generation(kind, seed):
    """generate() switches the experts' implementation, which the layer does not ask."""
    model = drawn(apply_lora(whole(kind), **NUMBERS, target_parameters=TARGETS)).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.tensor([[3, 1, 4]])
    merged = whole(kind).eval()
    merged.load_state_dict(merged_state_dict(model))
    expected = merged.generate(input_ids=ids, **options)
    with Calls() as calls:
        assert model.generate(input_ids=ids, **options).tolist() == expected.tolist()
    assert calls.names.count("lora_grouped_linear_forward") == 6 * 4


def test_numbers_by_pattern_and_dtypes(seed):
    model = whole("mixtral").bfloat16()
    apply_lora(
        model, r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, target_parameters=TARGETS,
        rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 9}, alpha_pattern={"down_proj": 6},
    )  # fmt: skip
    first, second = (module for module in model.modules() if isinstance(module, LoRAExperts))
    assert first.r == {"gate_up_proj": 4, "down_proj": 4}
    assert second.r == {"gate_up_proj": 4, "down_proj": 9}
    assert first.scaling == {"gate_up_proj": 8 / 2, "down_proj": 6 / 2}
    assert second.scaling == {"gate_up_proj": 4.0, "down_proj": 2.0}
    assert second.lora_B_down_proj.shape == (4, 32, 9)
    assert second.lora_B_down_proj.dtype == torch.float32
    assert second.down_proj.dtype == torch.bfloat16
    assert second.lora_dropout.p == 0.1
    assert second.lora_dropout.training == model.training
    assert logits(model).dtype == torch.bfloat16
    assert {row.fused for row in report(model)} == {True}


def test_hooks_and_flags_stay(seed):
    model = Holder(experts("mixtral", torch.float32))
    seen = []
    handle = model.experts.register_forward_hook(lambda *args: seen.append(1))
    apply_lora(model, **NUMBERS, target_parameters=["experts.down_proj"])
    x, ids = torch.randn(2, 16), torch.tensor([[0], [1]])
    model(x, ids, torch.ones(2, 1))
    handle.remove()
    model(x, ids, torch.ones(2, 1))
    assert seen == [1]
    assert model.experts.target_parameters == ("down_proj",)


def test_saved_modules_get_none(seed):
    model = whole("mixtral")
    saved = "layers.0.mlp"
    apply_lora(model, **NUMBERS, target_parameters=TARGETS, modules_to_save=[saved])
    assert list(kinds(model)) == ["model.layers.1.mlp.experts"]


def test_an_entry_that_matches_nothing_beside_others_warns(seed):
    with pytest.warns(RuntimeWarning, match=r"match no parameter, and are ignored: \['x.y'\]"):
        apply_lora(whole("mixtral"), **NUMBERS, target_parameters=[*TARGETS, "x.y"])


def llama4():
    module = Llama4TextExperts(types.SimpleNamespace(**SIZES))
    nn.init.normal_(module.gate_up_proj), nn.init.normal_(module.down_proj)
    return Holder(module)


def adapted():
    return apply_lora(whole("mixtral"), **NUMBERS, target_parameters=TARGETS)


BAD = {
    "nothing": (lambda: whole("mixtral"), ["no.such"], "matches no parameter; the model has "
                "'experts.gate_up_proj', 'experts.down_proj'"),
    "nothing at all": (lambda: Holder(nn.Linear(2, 2)), ["no.such"], "no stack of the weights"),
    "a string": (lambda: whole("mixtral"), "experts.down_proj", "must be a list of names"),
    "a router": (lambda: whole("mixtral"), ["gate.weight"], r"mlp.gate.weight \(MixtralTopKRouter"
                 r"\) cannot get LoRA: it is not of the experts interface.*patch_peft\(\)"),
    "Llama 4": (llama4, TARGETS, "not of the experts interface of Transformers 5; train it "),
    "a bias": (lambda: Holder(experts("gpt_oss")), ["down_proj_bias"], "only its stacks"),
    "a linear": (lambda: whole("mixtral"), ["q_proj.weight"], "name its module in target_modules"),
    "the model's own": (lambda: experts("mixtral"), ["down_proj"], "it is the model's own"),
    "a second time": (adapted, TARGETS, "it is a LoRA layer already"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "targets", "words"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_changes_nothing(build, targets, words, seed):
    model = build()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=words):
        apply_lora(model, **NUMBERS, target_modules=["q_proj"], target_parameters=targets)
    assert kinds(model) == kinds(before)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad


def test_stacks_inside_a_module_that_trains_as_a_whole_are_said_to_be_there(seed, recwarn):
    options = {**NUMBERS, "target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    said = r"matches .*experts\.down_proj' alone, which modules_to_save=\['experts'\] trains"
    with pytest.raises(ValueError, match=said):
        apply_lora(whole("mixtral"), **options, target_parameters=["experts.down_proj"])
    assert not recwarn.list


def test_target_modules_must_match_beside_them(seed):
    with pytest.raises(ValueError, match=r"target_modules=.'none'. matches no module"):
        apply_lora(whole("mixtral"), **NUMBERS, target_modules=["none"], target_parameters=TARGETS)
