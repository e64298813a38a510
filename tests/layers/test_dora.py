"""LoRALinear with use_dora, apply_lora with it, and what cannot have a magnitude."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels import LoRALinear, apply_lora, merge_lora, merged_state_dict
from lora_kernels.spec import DoraSpec, OutputSplits
from lora_kernels.testing.dora_problem import dora_formula
from tests.experts import whole
from tests.op_calls import Calls

DTYPE = torch.float64


def trained(layer):
    """layer with the values that training could have given it."""
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude.mul_(1 + 0.2 * torch.randn_like(layer.lora_magnitude))
    return layer


def make(device, k=6, n=5, **options):
    options = {"r": 2, "lora_alpha": 3, "dtype": DTYPE, "device": device, **options}
    return trained(LoRALinear(k, n, use_dora=True, **options))


def expected(layer, x):
    spec = DoraSpec(layer.scaling, 0.0, OutputSplits.whole(layer.out_features))
    weight = layer.oriented(layer.weight)
    operands = weight, layer.lora_A, layer.lora_B, layer.bias, layer.lora_magnitude
    return dora_formula(x, *operands, spec)


def assert_equal(actual, reference):
    torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_merged_weight(bias, fan_in_fan_out, seed, device):
    layer = make(device, bias=bias, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(2, 3, 6, dtype=DTYPE, device=device)
    y = layer(x)
    assert_equal(y, expected(layer, x))
    layer.eval()
    assert layer.merged
    with Calls() as calls:
        merged = layer(x)
    assert not calls.names
    assert_equal(merged, y)
    assert_equal(layer.merged_weight(), layer.weight + layer.delta_weight())


def test_it_starts_as_the_frozen_layer_and_then_as_lora(seed, device):
    layer = LoRALinear(6, 5, r=2, use_dora=True, device=device)
    plain = LoRALinear(6, 5, r=2, device=device)
    x = torch.randn(3, 6, device=device)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    plain.load_state_dict(layer.state_dict(), strict=False)
    layer(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, plain.lora_B.grad)
    with torch.no_grad():
        norms = layer.weight.norm(dim=1)
        trained(layer).reset_lora_parameters()
    torch.testing.assert_close(layer.lora_magnitude.detach(), norms)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_magnitude"])
@pytest.mark.parametrize("way", ["in place", "another parameter", "scaling"])
def test_a_change_takes_effect_while_merged(way, name, seed, device):
    layer, x = make(device).eval(), torch.randn(3, 6, dtype=DTYPE, device=device)
    before = layer(x)
    with torch.no_grad():
        if way == "in place":
            getattr(layer, name).mul_(1.5)
        elif way == "scaling":
            layer.scaling *= 2
        else:
            frozen = nn.Parameter(getattr(layer, name) * 1.5, requires_grad=False)
            setattr(layer, name, frozen)
    assert_equal(layer(x), expected(layer, x))
    assert not torch.equal(layer(x), before)
    assert_equal(layer.train()(x), expected(layer, x))


def test_copies_pickles_and_state_dicts(seed, device):
    layer, x = make(device).eval(), torch.randn(3, 6, dtype=DTYPE, device=device)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    other = make(device).eval()
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), other):
        assert torch.equal(copied(x), layer(x))
    assert "use_dora=True" in repr(layer)


def test_a_base_weight_that_is_loaded_before_training_brings_its_magnitude(seed, device):
    base = nn.Linear(6, 5, device=device, dtype=DTYPE)
    layer = LoRALinear(6, 5, r=2, use_dora=True, device=device, dtype=DTYPE)
    layer.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(3, 6, dtype=DTYPE, device=device)
    assert_equal(layer(x), base(x))
    magnitude = trained(layer).lora_magnitude.detach().clone()
    layer.load_state_dict(nn.Linear(6, 5, dtype=DTYPE).state_dict(), strict=False)
    assert torch.equal(layer.lora_magnitude, magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_over_16_bits(dtype, seed, device):
    linear = nn.Linear(6, 5, dtype=dtype, device=device)
    layer = LoRALinear.from_linear(linear, 2, use_dora=True, lora_dtype=torch.float32)
    assert layer.lora_magnitude.dtype == layer.lora_A.dtype == torch.float32
    assert layer.weight is linear.weight
    y = layer(torch.randn(3, 6, dtype=dtype, device=device))
    y.sum().backward()
    assert layer.lora_magnitude.grad.dtype == torch.float32


@pytest.mark.parametrize("low_rank_only", [False, True])
def test_dropout(low_rank_only, seed, device):
    layer = make(device, lora_dropout=0.5, dropout_low_rank_only=low_rank_only)
    x = torch.ones(400, 6, dtype=DTYPE, device=device)
    with torch.no_grad():
        layer.lora_A.zero_()  # what is left of dropout acts on the frozen layer
    layer.lora_magnitude.data.fill_(3)
    y = layer(x)
    assert y.unique(dim=0).shape[0] == (1 if low_rank_only else 2**6)
    assert_equal(layer.eval()(x), expected(layer, x))
    with torch.no_grad():
        layer.lora_A.normal_()
    assert layer.train()(x).unique(dim=0).shape[0] == 2**6


def test_rank_0_is_a_plain_linear(device):
    layer = LoRALinear(6, 5, r=0, use_dora=True, device=device)
    assert not layer.use_dora
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer(torch.randn(3, 6, device=device)).sum().backward()


def test_a_layer_on_the_meta_device_is_drawn_by_to_empty(seed, device):
    layer = LoRALinear(6, 5, r=2, use_dora=True, device="meta").to_empty(device=device)
    layer.reset_parameters()
    torch.testing.assert_close(layer.lora_magnitude, layer.weight.norm(dim=1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fx_keeps_the_layers_own_dropout(dropout_p, seed, device):
    layer = make(device, lora_dropout=dropout_p, merge_weights=False)
    graph, x = torch.fx.symbolic_trace(layer), torch.randn(3, 6, dtype=DTYPE, device=device)
    modules = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [node.target for node in modules] == ["lora_dropout"]
    assert_equal(graph.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_compiled_layer(dropout_p, seed, device):
    torch._dynamo.reset()
    layer, x = make(device, lora_dropout=dropout_p), torch.randn(3, 6, dtype=DTYPE, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (False, True):
        layer.train(mode)
        torch.manual_seed(seed)
        y = compiled(x)
        torch.manual_seed(seed)
        assert torch.equal(y, layer(x))
        if mode:
            y.sum().backward()
            assert layer.lora_magnitude.grad.any()
    torch._dynamo.reset()


# ---- models ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.q_proj, self.k_proj = nn.Linear(6, 6), Conv1D(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.q_proj(x) * self.k_proj(x)


def net(device, **options):
    model = Net().to(device, DTYPE)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], **options}
    apply_lora(model, use_dora=True, **options)
    for layer in (model.q_proj, model.k_proj):
        trained(layer)
    return model


def tokens(device):
    return torch.arange(14, device=device).view(2, 7) % 7


@pytest.mark.parametrize("use_rslora", [False, True])
def test_apply_lora(use_rslora, seed, device):
    model = net(device, use_rslora=use_rslora)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = ("lora_A", "lora_B", "lora_magnitude")
    assert training == {f"{path}.{name}" for path in ("q_proj", "k_proj") for name in factors}
    assert set(lora_kernels.lora_state_dict(model)) == training
    assert all(row.fused for row in lora_kernels.report(model))
    y = model(tokens(device))
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    plain = Net().to(device, DTYPE)
    plain.load_state_dict(merged_state_dict(model), strict=True)
    assert_equal(plain(tokens(device)), y)
    assert_equal(merge_lora(model)(tokens(device)), y)
    assert model.q_proj.merged


def test_training_lowers_the_loss(seed, device):
    model, target = net(device, lora_dropout=0.1), torch.randn(2, 7, 6, dtype=DTYPE, device=device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)

    def loss():
        return (model(tokens(device)) - target).pow(2).mean()

    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["embed"]}, r"embed \(Embedding\) .*use_dora: only nn.Linear"),
        ({"target_modules": ["q_proj", "conv"]}, r"conv \(Conv1d\) .*use_dora: only nn.Linear"),
        ({"adapters": {"a": {"r": 2, "lora_alpha": 2}}}, "use_dora cannot be given with adapters"),
        ({"adapters": {"a": {"r": 2, "lora_alpha": 2, "use_dora": True}}}, "use_dora"),
    ],
    ids=["embedding", "convolution", "named adapters", "a named adapter's"],
)
def test_what_cannot_have_a_magnitude_is_named(options, match, seed, device):
    model = Net().to(device)
    before = list(model.modules())
    numbers = {} if "adapters" in options else {"r": 2, "lora_alpha": 4}
    flag = {} if match == "use_dora" else {"use_dora": True}
    with pytest.raises(ValueError, match=match):
        apply_lora(model, **flag, **numbers, **options)
    assert list(model.modules()) == before


def test_stacks_of_experts_cannot_have_a_magnitude():
    model, parameters = whole("qwen3_moe"), ["experts.down_proj"]
    with pytest.raises(ValueError, match=r"target_parameters: .*down_proj .*use_dora"):
        apply_lora(model, r=2, lora_alpha=4, use_dora=True, target_parameters=parameters)


def test_merged_linears_and_shared_inputs_refuse(seed, device):
    with pytest.raises(NotImplementedError, match=r"^LoRAMergedLinear: use_dora=True.*LoRALinear"):
        lora_kernels.LoRAMergedLinear(6, 6, r=2, enable_lora=[True, False], use_dora=True)
    block = nn.Module()
    block.q_proj, block.k_proj = make(device), make(device)
    model = nn.ModuleDict({"attention": block})
    with pytest.raises(NotImplementedError, match=r"share_inputs: attention.q_proj .*use_dora"):
        lora_kernels.share_inputs(model)
    assert block.q_proj._shared_input is None


def test_merged_state_dicts_cannot_be_taken_back(seed, device):
    with pytest.raises(ValueError, match=r"q_proj has use_dora=True"):
        lora_kernels.use_merged_state_dicts(net(device))


def test_a_merged_weight_is_noticed_by_the_load(seed, device):
    model = net(device, merge_weights=True)
    layer, weight = model.q_proj, model.q_proj.weight.detach().clone()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight"] = layer.merged_weight()
    with pytest.warns(UserWarning, match="keeps its base weights"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, weight)
