"""LoRAExperts: PEFT's numbers, dropout on top of them, and what modules are put through."""

import copy
import io
import pickle
import types

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import LoRAExperts, lora_state_dict, merge_lora, merged_state_dict, report
from lora_kernels.layers import mixture
from lora_kernels.testing.tolerance import assert_close
from tests.experts import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    SIZES,
    TOKENS,
    Holder,
    Made,
    R,
    drawn,
    experts,
    inputs,
    up_name,
)
from tests.op_calls import Calls

every_family = pytest.mark.parametrize("family", FAMILIES)


def layer_of(family, dtype=torch.float64, **options):
    return drawn(LoRAExperts(experts(family, dtype), **({"r": R, "lora_alpha": 5} | options)))


def peft_like(layer):
    """PEFT's model with the same weights and factors."""
    plain = experts_without_lora(layer)
    targets = [f"experts.{name}" for name in layer.target_parameters]
    names = layer.target_parameters
    config = peft.LoraConfig(
        target_modules=[], target_parameters=targets, r=R,
        rank_pattern={f"experts.{name}": layer.r[name] for name in names},
        alpha_pattern={f"experts.{name}": layer.lora_alpha[name] for name in names},
    )  # fmt: skip
    dtype = next(layer.parameters()).dtype
    model = peft.get_peft_model(Holder(plain), config).to(dtype)
    wrapper = model.base_model.model.experts
    while hasattr(wrapper, "parameter_name"):
        a, b = (getattr(layer, name) for name in layer.factors_of(wrapper.parameter_name))
        with torch.no_grad():
            # lora_A counts experts slowest, lora_B fastest.
            wrapper.lora_A["default"].weight.copy_(torch.cat(list(a)))
            for expert in range(EXPERTS):
                wrapper.lora_B["default"].weight[:, expert::EXPERTS] = b[expert]
        wrapper = wrapper.base_layer
    return model


def experts_without_lora(layer):
    module = layer.experts_class(layer.config).to(next(layer.parameters()).dtype)
    state = {key: value for key, value in layer.state_dict().items() if "lora_" not in key}
    module.load_state_dict(state)
    return module.requires_grad_(False)


def solve(model, x, ids, weights, dy):
    """y, and the gradients of x, of the routing weights and of every factor, in PEFT's layout."""
    leaves = {"x": x, "weights": weights}
    leaves |= {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x, ids, weights)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def by_peft(layer, *args):
    """solve() by PEFT in float64, with gradients of the factors under this package's names."""
    model = peft_like(layer)
    model.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    solved = solve(model, *args)
    model.base_model.model.experts.get_base_layer().config._experts_implementation = "grouped_mm"
    found = {name: solved[name] for name in ("y", "x", "weights")}
    wrapper, path = model.base_model.model.experts, "base_model.model.experts"
    while hasattr(wrapper, "parameter_name"):
        a, b = layer.factors_of(wrapper.parameter_name)
        found[a] = torch.stack(solved[f"{path}.lora_A.default.weight"].chunk(EXPERTS))
        of_b = solved[f"{path}.lora_B.default.weight"]
        found[b] = torch.stack([of_b[:, e::EXPERTS] for e in range(EXPERTS)])
        wrapper, path = wrapper.base_layer, f"{path}.base_layer"
    return found


# ---- numbers ----


@every_family
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_float64_gives_pefts_numbers(family, ranks, seed):
    r = R if ranks == "one" else {up_name(family): R, "down_proj": 2}
    layer = layer_of(family, r=r)
    args = (*inputs(), torch.randn(TOKENS, HIDDEN, dtype=torch.float64))
    expected = by_peft(layer, *args)
    with Calls() as calls:
        actual = solve(layer, *args)
    assert calls.names.count("lora_grouped_linear_forward") == 2
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@every_family
def test_without_an_update_it_is_the_module_itself(family, seed):
    module = experts(family, torch.float32)
    expected = copy.deepcopy(module)
    layer = LoRAExperts(module, R)
    args = inputs(torch.float32)
    # float32 near ten, or a compiler that may add in another order
    torch.testing.assert_close(layer(*args), expected(*args), rtol=1e-5, atol=1e-5)
    assert layer.gate_up_proj is module.gate_up_proj if layer.has_gate else True
    assert layer.down_proj is module.down_proj
    assert not layer.down_proj.requires_grad


@every_family
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_parameters(family, which, seed):
    """The product without an update is Transformers', which takes no float64."""
    target = [up_name(family), "down_proj"][which]
    layer = layer_of(family, torch.float32, target_parameters=[target])
    assert layer.target_parameters == (target,)
    args = (*inputs(torch.float32), torch.randn(TOKENS, HIDDEN))
    expected, actual = by_peft(layer, *args), solve(layer, *args)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        # float32, rounded in another order, of values near ten
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@every_family
def test_bfloat16_is_as_near_as_the_merged_module(family, seed):
    """Beside the same module with the update folded into its weights."""
    layer = layer_of(family, torch.bfloat16, lora_dtype=torch.float32)
    x, ids, weights = inputs(torch.bfloat16, tokens=64)
    folded = layer.experts_class(layer.config).bfloat16()
    folded.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "lora_" not in k}
        | {name: layer.merged_stack(name) for name in layer.target_parameters}
    )
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact = double(x.double(), ids, weights.double())
        y = layer(x, ids, weights)
        assert y.dtype == torch.bfloat16
        assert_close(y, exact, folded(x, ids, weights), "y")


@pytest.mark.parametrize("family", ["gpt_oss", "muse_spark"])
def test_what_else_the_experts_hold_can_train(family, seed):
    """Biases and norms, as bias="all" and modules_to_save have them."""
    layer = LoRAExperts(experts(family, torch.float32), R)
    plain = experts_without_lora(layer)
    names = [name for name, p in plain.named_parameters() if p.dim() < 3]
    args, dy = inputs(torch.float32), torch.randn(TOKENS, HIDDEN)
    grads = []
    for module in (layer, plain):
        leaves = [module.get_parameter(name).requires_grad_() for name in names]
        grads.append(torch.autograd.grad(module(*args), leaves, dy))
    assert names
    for actual, expected in zip(*grads, strict=True):
        # float32, rounded in another order, of values near ten
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_family
def test_no_tensor_of_the_size_of_the_weights_is_made(family, seed):
    layer = layer_of(family, torch.float32)
    args = (*inputs(torch.float32, tokens=2), torch.randn(2, HIDDEN))
    stack = min(getattr(layer, name).numel() for name in layer.target_parameters)
    with Made() as made:
        solve(layer, *args)
    assert max(made.elements) < stack
    with Made() as made:
        merged_state_dict(Holder(layer))
    assert sum(size >= stack for size in made.elements) == 2  # the copies that it returns


@every_family
def test_autocast_leaves_the_products_in_the_weights_dtype(family, seed):
    """As Transformers' grouped product does."""
    module = experts(family, torch.float32)
    layer = LoRAExperts(copy.deepcopy(module), R)
    args = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = layer(*args), module(*args)
    assert actual.dtype == expected.dtype
    # float32 near ten, or a compiler that may add in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize("under", [True, False])
def test_products_may_round_float32_factors_under_autocast(family, under, seed, monkeypatch):
    asked, op = [], mixture.lora_grouped_linear
    monkeypatch.setattr(
        mixture, "lora_grouped_linear", lambda *args: asked.append(args[-1].narrow) or op(*args)
    )
    layer = layer_of(family, torch.bfloat16, lora_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=under):
        layer(*inputs(torch.bfloat16))
    assert asked == [under, under]


# ---- dropout ----


def test_dropout_has_the_mean_of_no_dropout(seed):
    """With a zero update before it, y is linear in the mask of down_proj's input."""
    layer = layer_of("mixtral", lora_dropout=0.4)
    layer.lora_B_gate_up_proj.data.zero_()
    args = inputs()
    with torch.no_grad():
        expected = layer.eval()(*args)
        layer.train()
        draws = torch.stack([layer(*args) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - expected).abs()
    assert (error <= 6 * draws.std(0) / 3000**0.5 + 1e-12).all()
    assert torch.equal(layer.eval()(*args), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"muse_spark"}))
def test_the_backward_sees_the_masks_of_the_forward(family, seed):
    """Gradients are those of differences of the forward with the same seeds.

    The norm of muse_spark computes in float32, too coarse for differences.
    """
    layer = layer_of(family, lora_dropout=0.3)
    x, ids, weights = inputs()
    dy = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)

    def value():
        torch.manual_seed(seed)
        return (layer(x, ids, weights) * dy).sum()

    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    for leaf, grad in zip(leaves, torch.autograd.grad(value(), leaves), strict=True):
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            leaf += 1e-6 * direction
            above = value()
            leaf -= 2e-6 * direction
            below = value()
            leaf += 1e-6 * direction
        # relu2 and clamps have corners, which differences may straddle
        torch.testing.assert_close(
            (above - below) / 2e-6, (grad * direction).sum(), rtol=1e-5, atol=1e-5
        )


def test_dropout_differs_between_experts_and_not_with_their_neighbours(seed):
    """A mask counts an expert's own rows."""
    layer = layer_of("mixtral", lora_dropout=0.5)
    x, _, _ = inputs()
    x, ones = x[:3].repeat(2, 1), torch.ones(6, 1, dtype=torch.float64)

    def run(ids):
        torch.manual_seed(seed)
        return layer(x, torch.tensor(ids)[:, None], ones)

    alone = run([4, 4, 4, 4, 4, 4])[:3]
    beside = run([4, 4, 4, 0, 1, 2])[:3]
    torch.testing.assert_close(beside, alone, rtol=1e-12, atol=1e-12)


# ---- what modules are put through ----


@every_family
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(family, how, seed):
    layer = layer_of(family, torch.float32)
    layer.config = None  # what a test's config is made of cannot be pickled
    args = inputs(torch.float32)
    expected = layer(*args)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(*args), expected)
    other.lora_A_down_proj.data.zero_()
    assert torch.equal(layer(*args), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant, seed):
    layer = layer_of("qwen3_moe", lora_dropout=0.2)
    x, ids, weights = inputs()
    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]

    def grads(run):
        torch.manual_seed(seed)
        for leaf in leaves:
            leaf.grad = None
        run().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = grads(lambda: layer(x, ids, weights))
    again = grads(lambda: checkpoint(layer, x, ids, weights, use_reentrant=reentrant))
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_it_compiles_as_one_graph(family, p, seed):
    torch._dynamo.reset()
    layer = layer_of(family, torch.float32, lora_dropout=p)
    args = inputs(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(seed)
    expected = layer(*args)
    torch.manual_seed(seed)
    # float32 near ten, or a compiler that may add in another order
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)
    compiled(*args).sum().backward()
    assert layer.lora_A_down_proj.grad is not None


@every_family
def test_state_dicts(family, seed):
    module = experts(family, torch.float32)
    keys = set(module.state_dict())
    layer = drawn(LoRAExperts(module, R))
    state = layer.state_dict()
    factors = {f"lora_{ab}_{name}" for ab in "AB" for name in (up_name(family), "down_proj")}
    assert set(state) == keys | factors
    model = Holder(layer)
    assert set(lora_state_dict(model)) == {f"experts.{name}" for name in factors}
    other = LoRAExperts(experts(family, torch.float32), R)
    other.load_state_dict(state)
    args = inputs(torch.float32)
    assert torch.equal(other(*args), layer(*args))


@every_family
def test_the_merged_state_dict_is_the_plain_modules(family, seed):
    layer = layer_of(family, torch.float32)
    merged = merged_state_dict(Holder(layer))
    plain = Holder(experts(family, torch.float32))
    plain.load_state_dict(merged, strict=True)
    args = inputs(torch.float32)
    # float32, rounded in another order, of values near ten
    torch.testing.assert_close(plain(*args), layer(*args), rtol=1e-4, atol=1e-4)


def test_merging_leaves_it_on_the_fly(seed):
    layer = layer_of("mixtral", torch.float32)
    args = inputs(torch.float32)
    expected = layer(*args)
    with pytest.warns(UserWarning, match="experts .a merged weight would be a second copy"):
        merge_lora(Holder(layer))
    assert not layer.merged
    assert torch.equal(layer(*args), expected)


def test_from_a_model_on_the_meta_device(seed):
    with torch.device("meta"):
        module = experts("mixtral", torch.float32)
    layer = LoRAExperts(module, R)
    assert layer.lora_A_down_proj.is_meta
    layer.to_empty(device="cpu").reset_lora_parameters()
    assert layer.lora_B_down_proj.abs().max() == 0
    assert 0 < layer.lora_A_down_proj.abs().max() <= layer.down_proj.shape[2] ** -0.5


def test_report_has_a_row_for_each_stack(seed):
    layer = layer_of("gpt_oss", torch.float32)
    rows = {row.name: row for row in report(Holder(layer))}
    assert list(rows) == ["experts.gate_up_proj", "experts.down_proj"]
    row = rows["experts.gate_up_proj"]
    assert row.weight == (EXPERTS, 48, HIDDEN)  # [E, out, in], however it is stored
    assert row.kind == "LoRAExperts(GptOssExperts.gate_up_proj)"
    assert row.fused
    assert row.ranks == (R,)
    assert "5 experts in one call" in row.reason


# ---- bad input ----


def spread(module):
    module._is_expert_parallel = True


def replaced(module):
    module.forward = module.forward.__get__(module)


def parametrized(module):
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spread, "spread over processes"),
        (replaced, "forward has been replaced"),
        (parametrized, "parametrized"),
    ],
)
def test_modules_that_cannot_be_wrapped(change, words, seed):
    module = experts("mixtral", torch.float32)
    change(module)
    with pytest.raises(ValueError, match=f"LoRAExperts: experts .*{words}"):
        LoRAExperts(module, R)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_modules_that_are_no_experts(seed):
    for module in (nn.Linear(2, 2), Llama4TextExperts(types.SimpleNamespace(**SIZES))):
        with pytest.raises(TypeError, match="not of the experts interface"):
            LoRAExperts(module, R)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r must be >= 1"),
        ({"r": {"down_proj": 2}}, "r must have a number for each"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "dropout"),
        ({"target_parameters": ["gate_up_proj_bias"]}, "only its stacks of weights"),
        ({"target_parameters": []}, "must name some of"),
    ],
)
def test_bad_arguments(options, words, seed):
    module = experts("gpt_oss", torch.float32)
    with pytest.raises(ValueError, match=words):
        LoRAExperts(module, **({"r": R} | options))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), "hidden_states must have shape"),
        (lambda x, i, w: (x[None], i, w), "hidden_states must have shape"),
        (lambda x, i, w: (x, i[1:], w), "top_k_index must be integers of shape"),
        (lambda x, i, w: (x, i.float(), w), "top_k_index must be integers of shape"),
        (lambda x, i, w: (x, i, w[:, :1]), "top_k_weights must have"),
    ],
)
def test_calls_that_do_not_fit(change, words, seed):
    with pytest.raises(ValueError, match=f"LoRAExperts: {words}"):
        layer_of("mixtral")(*change(*inputs()))


def test_a_transform_is_named(seed):
    layer = layer_of("mixtral")
    x, ids, weights = inputs()
    with pytest.raises(NotImplementedError, match="LoRAExperts: "):
        torch.func.jvp(lambda x: layer(x, ids, weights), (x,), (x,))
