"""share_inputs: the same results, in one call if layers see the same x."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lora
from lora_kernels.testing.tolerance import assert_close
from tests.layers.attention import (
    ALONE,
    NAMES,
    SHARED,
    calls_of,
    make,
    traces_joined_layers,
)


def solve(model, x, *context):
    x = x.detach().requires_grad_()
    y = model(x, *context)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().sum(), [x, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", *trained], grads, strict=True))}


def assert_same(model, shared, x, *context):
    exact = copy.deepcopy(model).double()
    reference = solve(exact, x.double(), *(c.double() for c in context))
    baseline = solve(model, x, *context)
    for name, result in solve(shared, x, *context).items():
        assert_close(result, reference[name], baseline[name], name)


@pytest.mark.parametrize("algorithm", ["reference", "fused", "addmm"], indirect=True)
def test_joined_layers_give_the_same_numbers_in_one_call(algorithm, seed, device):
    model, x = make(device)
    shared = copy.deepcopy(model)
    assert lora.share_inputs(shared) == [NAMES]
    assert calls_of(shared, x) == [SHARED, ALONE]
    assert calls_of(model, x) == [ALONE] * 4
    assert_same(model, shared, x)


def test_state_dict_and_parameters_stay_what_they_are(seed, device):
    model, _ = make(device)
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    lora.share_inputs(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys


def test_cross_attention_is_right(seed, device):
    model, x = make(device)
    shared = copy.deepcopy(model)
    lora.share_inputs(shared)
    assert_same(model, shared, x, torch.randn_like(x))


def test_x_changed_in_place_is_another_one(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        changed = model.k_proj(x)
        model.q_proj._shared_input = model.k_proj._shared_input = None
        assert torch.equal(changed, model.k_proj(x))


@pytest.mark.parametrize("change", ["lora_A", "lora_B", "scaling"])
def test_adapters_changed_in_between_take_effect(change, seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    with torch.no_grad():
        model.q_proj(x)
        if change == "scaling":
            model.k_proj.scaling = 5.0
        else:
            getattr(model.k_proj, change).mul_(3)
        assert torch.equal(model.k_proj(x), alone(model.k_proj, x))


def alone(layer, x):
    single = copy.deepcopy(layer)
    single._shared_input = None
    return single(x)


def test_graph_is_not_handed_from_no_grad_to_grad(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    with torch.no_grad():
        assert not model.q_proj(x).requires_grad
    assert model.k_proj(x).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_same_gradients(use_reentrant, seed, device):
    model, x = make(device, dropout=0.3)
    lora.share_inputs(model)

    def run(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    results = []
    for function in (model, run):
        torch.manual_seed(3)
        leaf = x.detach().requires_grad_()
        model.zero_grad()
        function(leaf).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append({"x": leaf.grad, **grads})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


def test_merged_layers_compute_alone(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    trained = model(x)
    model.eval()
    assert calls_of(model, x) == []
    assert_close(model(x), trained.double(), trained, "merged")
    model.train()
    assert calls_of(model, x) == [SHARED, ALONE]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_share_among_themselves(way, seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    model.q_proj(x)  # what waits to be fetched is not copied
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.q_proj._shared_input is twin.k_proj._shared_input
    assert twin.q_proj._shared_input.layers[0] is twin.q_proj
    assert calls_of(twin, x) == [SHARED, ALONE]
    with torch.no_grad():
        twin.k_proj.lora_B.zero_()
    assert not torch.equal(twin.k_proj(x), model.k_proj(x))


def test_layer_put_elsewhere_computes_alone(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    stranger = lora.LoRALinear(12, 8, r=3).to(device)
    stranger._shared_input = model.q_proj._shared_input
    assert calls_of(stranger, x) == [ALONE]


def test_layers_that_agree_are_joined_and_no_others(seed, device):
    model, _ = make(device)
    model.k_proj = lora.LoRALinear(12, 8, r=4).to(device)
    assert lora.share_inputs(model) == [("q_proj", "v_proj")]
    assert model.k_proj._shared_input is None


@pytest.mark.parametrize(
    "groups", [(), [("a", "b")], [("q_proj", "o_proj")], [("q_proj",)]], ids=str
)
def test_share_inputs_with_nothing_to_join_is_an_error(groups, seed, device):
    model, _ = make(device)
    with pytest.raises(ValueError, match="share_inputs: no module has two LoRALinear children"):
        lora.share_inputs(model, groups)


@traces_joined_layers
def test_compiles_as_one_graph(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    eager = solve(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaf = x.detach().requires_grad_()
    y = compiled(leaf)
    assert torch.equal(y, eager["y"])
    (grad,) = torch.autograd.grad(y.square().sum(), leaf)
    assert torch.equal(grad, eager["x"])


@traces_joined_layers
@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_compiles_where_no_gradient_is_recorded(frozen, seed, device):
    model, x = make(device)
    model.requires_grad_(not frozen)
    lora.share_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(frozen):
        assert torch.equal(compiled(x), model(x))


def test_layer_whose_output_nothing_uses_has_no_gradient(seed, device):
    model, x = make(device)
    lora.share_inputs(model)
    model.q_proj(x).sum().backward()
    assert model.q_proj.lora_A.grad is not None
    for layer in (model.k_proj, model.v_proj):
        assert layer.lora_A.grad is None
        assert layer.lora_B.grad is None


def change_mode(model, x):
    model.eval()


def change_dropout(model, x):
    for layer in model.children():
        layer.lora_dropout.p = 0.0


def change_weight(model, x):
    model.k_proj.weight = nn.Parameter(model.k_proj.weight + 1)


def change_weight_in_place(model, x):
    with torch.no_grad():
        model.k_proj.weight.add_(1)


def change_x(model, x):
    x.add_(1)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize(
    "change", [change_mode, change_dropout, change_weight, change_weight_in_place, change_x]
)
def test_outputs_from_before_a_change_are_not_used_behind_it(change, inference, seed, device):
    model, _ = make(device, dropout=0.5 if "weight" not in change.__name__ else 0.0,
                    merge_weights=False)  # fmt: skip
    if change is change_x:
        model.eval()
    lora.share_inputs(model)
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.randn(2, 5, 12, device=device)
        model.q_proj(x)
        change(model, x)
        k = model.k_proj(x)
        expected = copy.deepcopy(model.k_proj)
        expected._shared_input = None
        torch.testing.assert_close(k, expected(x))


def test_cross_attention_is_left_out(seed, device):
    model = nn.ModuleDict({"self_attn": make(device)[0], "encoder_attn": make(device)[0]})
    assert lora.share_inputs(model) == [tuple(f"self_attn.{name}" for name in NAMES)]
    del model["self_attn"]
    with pytest.raises(ValueError, match="no module has two"):
        lora.share_inputs(model)
    assert lora.share_inputs(model, exclude=())


def test_share_inputs_of_a_t5_joins_self_attention_and_gates_alone(seed, device):
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = lora.apply_lora(T5Model(config), r=2, lora_alpha=4)
    ends = [[path.split(".")[-2:] for path in paths] for paths in lora.share_inputs(model)]
    attention = [["SelfAttention", name] for name in "qkv"]
    gates = [["DenseReluDense", name] for name in ("wi_0", "wi_1")]
    assert ends == [attention, gates] * 2


MISTAKES = {
    "type": lambda x: x.tolist(),
    "layout": lambda x: x.to_sparse(),
    "kind": lambda x: x.to(torch.complex64),
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "shape": lambda x: x[..., :5],
    "scalar": lambda x: x[0, 0, 0],
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_errors_are_those_of_the_layer_alone(mistake, seed, device):
    model, x = make(device)
    errors = []
    for joined in (False, True):
        if joined:
            lora.share_inputs(model)
        for training in (True, False):
            with pytest.raises((TypeError, ValueError)) as error:
                model.train(training).k_proj(mistake(x))
            errors.append((error.type, str(error.value)))
    assert errors == errors[:1] * 4
    assert errors[0][1].startswith("LoRALinear(in_features=12, out_features=8,")


def test_share_inputs_of_a_llama_takes_one_call_for_attention_and_one_for_its_gates(seed, device):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=11,
    )  # fmt: skip
    model = lora.apply_lora(LlamaModel(config).to(device), r=2, lora_alpha=4)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    tokens = torch.randint(11, (2, 6), device=device)
    expected = model(tokens).last_hidden_state
    assert len(lora.share_inputs(model)) == 4
    assert calls_of(model, tokens) == [SHARED, ALONE, SHARED, ALONE] * 2
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
