"""patch_peft() over experts (target_parameters): PEFT's numbers, and no stack of folded weights."""

import copy
import types

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.integrations.peft import experts as patched_experts
from lora_kernels.testing.tolerance import assert_close
from tests.experts import (
    CONFIGS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    SIZES,
    TARGETS,
    TOKENS,
    Holder,
    Made,
    R,
    drawn,
    experts,
    inputs,
    up_name,
)
from tests.experts import whole as plain
from tests.op_calls import Calls

pytestmark = pytest.mark.usefixtures("unpatched")

every_family = pytest.mark.parametrize("family", FAMILIES)


def with_lora(family, targets=None, dtype=torch.float64, **options):
    """A PEFT model of one experts module, with factors that are not zero."""
    module = experts(family, torch.float32)
    targets = [up_name(family), "down_proj"] if targets is None else targets
    options = {"r": R, "lora_alpha": 5, "target_modules": [], **options}
    names = [f"experts.{name}" for name in targets]
    config = peft.LoraConfig(target_parameters=names, **options)
    return drawn(peft.get_peft_model(Holder(module), config)).to(dtype)


def module_of(model):
    return outermost(model).get_base_layer()


def outermost(model):
    return next(module for module in model.modules() if isinstance(module, ParamWrapper))


def solve(model, x, ids, weights, dy):
    """y, and the gradients of x, of the routing weights and of every factor."""
    leaves = {"x": x, "weights": weights}
    leaves |= {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x, ids, weights)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def exactly(model, *args):
    """solve() by PEFT: Transformers' products take no float64 but in a loop over the experts."""
    module_of(model).config._experts_implementation = "eager"
    try:
        return solve(model, *args)
    finally:
        module_of(model).config._experts_implementation = "grouped_mm"


def fused(model, *args, calls):
    patch_peft()
    with Calls() as made:
        solved = solve(model, *args)
    unpatch_peft()
    assert made.names.count("lora_grouped_linear_forward") == calls
    return solved


# ---- numbers ----


@every_family
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 4}], ids=str)
def test_float64_gives_pefts_numbers(family, options, seed):
    model = with_lora(family, **options)
    args = (*inputs(), torch.randn(TOKENS, HIDDEN, dtype=torch.float64))
    expected = exactly(model, *args)
    for name, value in fused(model, *args, calls=2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@every_family
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_float32_is_as_near_as_peft(family, implementation, seed):
    model = with_lora(family, dtype=torch.float32)
    module_of(model).config._experts_implementation = implementation
    x, ids, weights = inputs(torch.float32, tokens=64)
    dy = torch.randn(64, HIDDEN)
    double = [tensor.detach().double().requires_grad_() for tensor in (x, weights)]
    exact = exactly(copy.deepcopy(model).double(), double[0], ids, double[1], dy.double())
    expected, actual = (
        solve(model, x, ids, weights, dy),
        fused(model, x, ids, weights, dy, calls=2),
    )
    for name, value in actual.items():
        assert_close(value, exact[name], expected[name], name)


@every_family
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_parameters(family, which, seed):
    """The product without an update is Transformers', which takes no float64."""
    target = [up_name(family), "down_proj"][which]
    model = with_lora(family, [target], torch.float32)
    args = (*inputs(torch.float32), torch.randn(TOKENS, HIDDEN))
    expected = solve(model, *args)
    for name, value in fused(model, *args, calls=1).items():
        # float32, rounded in another order, of values near ten
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_llama4_runs_pefts_code(seed):
    """Its experts are not of the interface: PEFT's factors lie the other way round there."""
    config = types.SimpleNamespace(**SIZES)
    module = Llama4TextExperts(config)
    nn.init.normal_(module.gate_up_proj), nn.init.normal_(module.down_proj)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=R, target_modules=[], target_parameters=targets)
    model = drawn(peft.get_peft_model(Holder(module), config))
    x = torch.randn(EXPERTS * 3, HIDDEN)
    expected = model(x)
    patch_peft()
    assert torch.equal(model(x), expected)
    assert {row.fused for row in report(model)} == {False}
    assert {row.reason for row in report(model)} == {
        "Llama4TextExperts is not of Transformers' experts interface"
    }


@pytest.mark.parametrize("size", [7e-4, 7e-3])
def test_a_small_update_arrives_in_bfloat16(size, seed):
    """PEFT folds it into weights of 8 bits, which loses most of one below their rounding."""
    model = with_lora("mixtral", dtype=torch.bfloat16)
    with torch.no_grad():
        for wrapper in (outermost(model), outermost(model).base_layer):
            weight, b = wrapper.get_param(), wrapper.lora_B["default"].weight
            rms = wrapper.get_delta_weight("default").float().square().mean().sqrt()
            b.mul_(size * weight.float().square().mean().sqrt() / rms)
    x, ids, weights = inputs(torch.bfloat16, tokens=8192)
    double = copy.deepcopy(model).double()
    module_of(double).config._experts_implementation = "eager"
    with torch.no_grad():
        exact = double(x.double(), ids, weights.double())
        with double.disable_adapter():
            without = double(x.double(), ids, weights.double())
        update = exact - without

        def share(y, base):
            """How much of the update is in y: 1 if all of it is."""
            return ((y.double() - base.double()) * update).sum() / update.square().sum()

        with model.disable_adapter():
            base = model(x, ids, weights)
        folded = share(model(x, ids, weights), base)
        patch_peft()
        arrived = share(model(x, ids, weights), base)
    assert abs(arrived - 1) < 0.1, arrived  # roundings of y, over 131072 elements
    if size < 1e-3:
        assert folded < 0.75, folded


@every_family
def test_no_tensor_of_the_size_of_the_weights_is_made(family, seed):
    model = with_lora(family, dtype=torch.float32)
    args = (*inputs(torch.float32, tokens=2), torch.randn(2, HIDDEN))
    stack = min(weight.numel() for weight in module_of(model).parameters() if weight.dim() == 3)
    patch_peft()
    with Made() as made:
        solve(model, *args)
    assert max(made.elements) < stack
    unpatch_peft()
    with Made() as made:
        solve(model, *args)
    assert max(made.elements) >= stack


@every_family
def test_second_derivatives_and_batches_of_gradients_are_pefts(family, seed):
    model = with_lora(family)
    x, ids, weights = inputs()
    factors = [p for p in model.parameters() if p.requires_grad]
    dys = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)

    def solve_twice():
        y = model(x, ids, weights)
        batched = torch.autograd.grad(
            y, [x, *factors], dys, is_grads_batched=True, retain_graph=True
        )
        grads = torch.autograd.grad(y, [x, *factors], dys[0], create_graph=True)
        return [*batched, *torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *factors])]

    module_of(model).config._experts_implementation = "eager"
    expected = solve_twice()
    module_of(model).config._experts_implementation = "grouped_mm"
    patch_peft()
    for actual, other in zip(solve_twice(), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-9)


# ---- whole models ----

both_models = pytest.mark.parametrize("kind", CONFIGS)


def whole(kind):
    options = {"target_modules": ["q_proj"], "target_parameters": TARGETS}
    config = peft.LoraConfig(r=R, task_type="CAUSAL_LM", **options)
    return drawn(peft.get_peft_model(plain(kind), config))


def step(model):
    ids = torch.arange(24).view(2, 12) * 7 % 40
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def near(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        # float32 through a whole model, rounded in another order
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@both_models
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
def test_a_training_step_of_a_whole_model(kind, checkpointing, seed):
    model = whole(kind).train()
    expected = step(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    patch_peft()
    with Calls() as calls:
        actual = step(model)
    assert calls.names.count("lora_grouped_linear_backward") == 4
    near(actual, expected)
    rows = {row.name: row for row in report(model) if "experts" in row.name}
    assert [row.fused for row in rows.values()] == [True] * 4
    assert all("4 experts in one call" in row.reason for row in rows.values())


@both_models
def test_decoding_folds_nothing_and_gives_the_same_tokens(kind, seed):
    model = whole(kind).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.tensor([[3, 1, 4]])
    expected = model.generate(input_ids=ids, **options)
    patch_peft()
    with Calls() as calls:
        actual = model.generate(input_ids=ids, **options)
    assert actual.tolist() == expected.tolist()
    assert calls.names.count("lora_grouped_linear_forward") == 6 * 4


@both_models
def test_a_whole_model_compiles_as_one_graph(kind, seed):
    torch._dynamo.reset()
    model = whole(kind)
    patch_peft()
    ids = torch.arange(12)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(input_ids=ids).logits
    # the compiler may add in another order
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_switched_and_saved_as_ever(seed, tmp_path):
    model = whole("qwen3_moe")
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS)
    )
    drawn(model)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = step(model)
    patch_peft()
    for name in ("other", "default"):
        model.set_adapter(name)
        near(step(model), expected[name])
    before = model.state_dict()
    unpatch_peft()
    assert list(before) == list(model.state_dict())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    patch_peft()
    base = plain("qwen3_moe")
    base.load_state_dict(model.unload().state_dict())
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    near(step(again), expected["default"])


# ---- the guard ----


def disable(model):
    model.base_model.disable_adapter_layers()


def hook(model):
    outermost(model).base_layer.register_forward_hook(lambda *args: None)


def hook_experts(model):
    module_of(model).register_forward_hook(lambda *args: None)


def own_forward(model):
    module = module_of(model)
    module.forward = types.MethodType(type(module).forward, module)


def spread(model):
    module_of(model)._is_expert_parallel = True


def train_base(model):
    module_of(model).down_proj.requires_grad_(True)


def second(model):
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])


def eager(model):
    module_of(model).config._experts_implementation = "eager"


REASONS = {
    "disabled": (disable, "its adapters are disabled"),
    "merged": (lambda model: model.merge_adapter(), "its adapters are merged"),
    "two active": (second, "2 of its adapters are active"),
    "a hook inside": (hook, "an inner wrapper has hooks"),
    "a hook on the experts": (hook_experts, "Qwen3MoeExperts has hooks"),
    "an instance's forward": (own_forward, "Qwen3MoeExperts has a forward of its own"),
    "expert parallel": (spread, "its experts are spread over processes"),
    "trained": (train_base, "down_proj is trained itself"),
    "eager": (eager, "its experts_implementation is 'eager'"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS.keys())
def test_what_the_guard_does_not_know_runs_pefts_code(change, reason, seed):
    model = with_lora("qwen3_moe", dtype=torch.float32)
    x, ids, weights = inputs(torch.float32)
    change(model)
    expected = model(x, ids, weights)
    patch_peft()
    with Calls() as calls:
        actual = model(x, ids, weights)
    assert calls.names == []
    assert torch.equal(actual, expected)
    rows = report(model)
    assert rows
    assert {(row.fused, row.reason) for row in rows} == {(False, reason)}


def zeros(module, hidden, ids, weights):
    return hidden * 0


def test_a_forward_that_a_user_registers_runs(seed, monkeypatch):
    """In the place of Transformers' own, under its name."""
    model = with_lora("qwen3_moe", dtype=torch.float32)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", zeros)
    patch_peft()
    assert not model(*inputs(torch.float32)).any()
    assert {row.reason for row in report(model)} == {
        "its experts_implementation 'grouped_mm' is not that of Transformers"
    }


def test_no_tokens_give_no_rows(seed):
    model = with_lora("qwen3_moe", dtype=torch.float32)
    x, ids, weights = inputs(torch.float32)
    patch_peft()
    with Calls() as calls:
        assert model(x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)
    assert calls.names == ["lora_grouped_linear_forward"] * 2


@pytest.mark.parametrize("number", [-1, EXPERTS])
def test_numbers_that_no_expert_has_run_pefts_code(number, seed):
    model = with_lora("qwen3_moe", dtype=torch.float32)
    x, ids, weights = inputs(torch.float32)
    ids[3, 0] = number
    patch_peft()
    with Calls() as calls:
        model(x, ids, weights)
    assert calls.names == []


def test_arguments_by_keyword_run_pefts_code(seed):
    model = with_lora("mixtral", dtype=torch.float32)
    x, ids, weights = inputs(torch.float32)
    patch_peft()
    with Calls() as calls:
        model(x, top_k_index=ids, top_k_weights=weights)
    assert calls.names == []


@pytest.mark.parametrize("name", list(patched_experts._KNOWN))
def test_an_unknown_version_runs_pefts_code(name, seed, monkeypatch):
    monkeypatch.setitem(patched_experts._KNOWN, name, "another")
    model = with_lora("mixtral", dtype=torch.float32)
    patch_peft()
    with Calls() as calls:
        model(*inputs(torch.float32))
    assert calls.names == []
    assert {row.reason for row in report(model)} == {f"{name} is not that of a known version"}


def test_a_router_weight_runs_pefts_code(seed):
    """A parameter of two dimensions goes through the same wrapper."""
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    model = drawn(peft.get_peft_model(Holder(nn.Linear(4, 6)), config))
    x = torch.randn(3, 4)
    expected = model(x)
    patch_peft()
    assert torch.equal(model(x), expected)
    (row,) = report(model)
    assert row.reason == "weight has 2 dimensions"
