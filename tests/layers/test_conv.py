"""LoRAConv1d, LoRAConv2d, LoRAConv3d: loralib's convolutions, corrected, with every option."""

import copy
import math
import pickle

import loralib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels import LoRALayer
from lora_kernels.layers.conv import ConvLoRA, LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_kernels.testing.tolerance import assert_close

CIN, COUT, R, ALPHA = 4, 6, 2, 3
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KINDS = {1: (LoRAConv1d, nn.Conv1d), 2: (LoRAConv2d, nn.Conv2d), 3: (LoRAConv3d, nn.Conv3d)}
LAYERS = [LoRAConv1d, LoRAConv2d, LoRAConv3d]
CASES = [
    (1, 3, {}),
    (1, 1, {"stride": 2, "groups": 2}),
    (2, 3, {"padding": 1}),
    (2, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    (2, (1, 3), {"padding": "same", "padding_mode": "circular"}),
    (3, 2, {}),
    (3, (2, 1, 3), {"padding": 1, "padding_mode": "replicate", "bias": False}),
]


@pytest.fixture(autouse=True)
def float32_is_float32():
    """cuDNN would round float32 operands to TF32 by default, and choose among algorithms."""
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        yield


def make(dimensions, kernel_size, device="cpu", r=R, dtype=None, lora_dtype=None, **options):
    """A layer whose lora_B is not zero, in training mode."""
    layer = KINDS[dimensions][0](
        CIN, COUT, kernel_size, r, ALPHA, device=device, dtype=dtype, **options
    )
    if r > 0:
        nn.init.normal_(layer.lora_B)
        for parameter in adapter(layer):
            parameter.data = parameter.to(lora_dtype or parameter.dtype)
    return layer


def adapter(layer):
    return layer.lora_A, layer.lora_B


def make_input(layer, dtype=None, batch=2):
    weight = layer.conv.weight
    shape = (batch, CIN, *range(7, 7 + weight.dim() - 2))
    return torch.randn(shape, device=weight.device, dtype=dtype or weight.dtype)


def formula(layer, x, dtype=None):
    """y in plain PyTorch, differentiable, in dtype or as the operands are."""
    weight, a, b, x = (
        t if dtype is None else t.to(dtype) for t in (layer.conv.weight, *adapter(layer), x)
    )
    bias = layer.conv.bias if layer.conv.bias is None else layer.conv.bias.to(x.dtype)
    delta = (b @ a).view(weight.shape) * layer.scaling
    return layer.conv._conv_forward(x, weight + delta.to(weight.dtype), bias)


def assert_same_up_to_rounding(actual, expected):
    """Two ways through the same arithmetic."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bound = 8 * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


def loralib_pair(device, kernel_size, **options):
    """loralib's Conv2d and ours with the same values."""
    theirs = loralib.Conv2d(CIN, COUT, kernel_size, R, ALPHA, **options).to(device)
    nn.init.normal_(theirs.lora_B)
    ours = LoRAConv2d(CIN, COUT, kernel_size, R, ALPHA, device=device, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# ---- loralib's surface ----


@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_same_seed_draws_loralibs_values_under_loralibs_keys(kernel_size, groups, r, seed):
    theirs = loralib.Conv2d(CIN, COUT, kernel_size, r, ALPHA, groups=groups)
    torch.manual_seed(seed)
    ours = LoRAConv2d(CIN, COUT, kernel_size, r, ALPHA, groups=groups)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_loralibs(
    training, merge_weights, kernel_size, groups, seed, device
):
    options = {"groups": groups, "merge_weights": merge_weights, "padding": 1, "stride": 2}
    theirs, ours = loralib_pair(device, kernel_size, **options)
    layers = (ours, copy.deepcopy(theirs).double(), theirs)
    x = make_input(ours)
    dy = torch.randn_like(theirs(x))
    outputs, grads = [], []
    for layer in layers:
        layer.train(training)
        inputs = x.detach().to(layer.conv.weight.dtype).requires_grad_()
        outputs.append(layer(inputs))
        leaves = [inputs, layer.conv.bias, *(() if layer.merged else adapter(layer))]
        grads.append(torch.autograd.grad(outputs[-1], leaves, dy.to(inputs.dtype)))
    assert ours.merged == theirs.merged == (merge_weights and not training)
    assert_close(*outputs)
    for gradients in zip(*grads, strict=True):
        assert_close(*gradients)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_checkpoints_go_both_ways(kernel_size, seed, device):
    theirs, ours = loralib_pair(device, kernel_size)
    x = make_input(ours)
    assert_same_up_to_rounding(ours(x), theirs(x))
    back = loralib.Conv2d(CIN, COUT, kernel_size, R, ALPHA).to(device)
    back.load_state_dict(ours.state_dict())
    assert torch.equal(back(x), theirs(x))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_layer_is_a_lora_layer_around_conv_with_one_parameter_each(layer_class):
    layer = layer_class(CIN, COUT, 1, R, ALPHA, 0.1)
    assert isinstance(layer, LoRALayer)
    assert isinstance(layer, ConvLoRA)
    assert isinstance(layer, nn.Module)
    assert (layer.r, layer.lora_alpha, layer.scaling) == (R, ALPHA, ALPHA / R)
    assert (layer.merged, layer.merge_weights, layer.lora_dropout.p) == (False, True, 0.1)
    assert layer.weight is layer.conv.weight
    assert layer.bias is layer.conv.bias
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert names == ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer_class(CIN, COUT, 1, bias=False).bias is None


def test_conv_lora_takes_the_module_class(seed):
    layer = ConvLoRA(nn.Conv2d, CIN, COUT, 3, r=R, lora_alpha=ALPHA, padding=1)
    torch.manual_seed(seed)
    named = LoRAConv2d(CIN, COUT, 3, R, ALPHA, padding=1)
    layer.load_state_dict(named.state_dict())
    x = make_input(layer)
    assert torch.equal(layer(x), named(x))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_rank_zero_is_a_plain_trainable_convolution(layer_class, seed, device):
    layer = layer_class(CIN, COUT, 2, device=device)
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]
    assert not hasattr(layer, "scaling")
    assert layer.weight.requires_grad
    x = make_input(layer)
    assert torch.equal(layer(x), layer.conv(x))
    assert layer.eval().merged
    assert torch.equal(layer(x), layer.conv(x))


@pytest.mark.parametrize("dimensions", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_shapes_of_the_factors_for_any_kernel(groups, dimensions):
    kernel = (3, 2, 4)[:dimensions]
    layer = make(dimensions, kernel, groups=groups)
    assert layer.lora_A.shape == (R * 3, CIN * 3)
    assert layer.lora_B.shape == (COUT // groups * math.prod(kernel[1:]), R * 3)


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("r", {"r": -1}),
        ("r", {"r": 1.5}),
        ("lora_alpha", {"r": 2, "lora_alpha": float("inf")}),
        ("lora_dropout", {"r": 2, "lora_dropout": 1.0}),
        ("lora_dropout", {"r": 2, "lora_dropout": float("nan")}),
        ("kernel_size", {"kernel_size": 0}),
        ("kernel_size", {"kernel_size": (3,)}),
        ("kernel_size", {"kernel_size": (3, -1)}),
        ("kernel_size", {"kernel_size": (3, 3, 3)}),
        ("kernel_size", {"kernel_size": 2.0}),
        ("kernel_size", {"kernel_size": True}),
        ("kernel_size", {"kernel_size": "3"}),
        ("kernel_size", {"kernel_size": None}),
    ],
)
def test_bad_arguments_are_named(argument, kwargs):
    with pytest.raises(ValueError, match=f"LoRAConv2d: {argument} must be"):
        LoRAConv2d(CIN, COUT, **{"kernel_size": 3, **kwargs})


@pytest.mark.parametrize("conv_module", [None, nn.Linear, nn.ConvTranspose2d, nn.Conv2d(1, 1, 1)])
def test_bad_conv_module_is_named(conv_module):
    with pytest.raises(ValueError, match=r"ConvLoRA: conv_module must be nn\.Conv1d"):
        ConvLoRA(conv_module, CIN, COUT, 3)


# ---- values and gradients ----


@pytest.mark.parametrize(("dimensions", "kernel_size", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_of_every_option(
    dtype, dimensions, kernel_size, options, seed, device
):
    layer = make(dimensions, kernel_size, device, dtype=dtype, **options)
    x = make_input(layer).requires_grad_()
    leaves = [x, *adapter(layer)]
    y, exact, baseline = layer(x), formula(layer, x, torch.float64), formula(layer, x)
    assert_close(y, exact, baseline)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    exact_grads = torch.autograd.grad(exact, leaves, dy.double())
    baseline_grads = torch.autograd.grad(baseline, leaves, dy)
    for grad, truth, other in zip(grads, exact_grads, baseline_grads, strict=True):
        assert_close(grad, truth.double(), other)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_options_in_any_combination(data):
    dimensions = data.draw(st.integers(1, 3), "dimensions")

    def per_dimension(low, high, name):
        values = data.draw(st.tuples(*[st.integers(low, high)] * dimensions), name)
        return values[0] if data.draw(st.booleans(), f"{name} as int") else values

    kernel = per_dimension(1, 3, "kernel_size")
    options = {
        "stride": per_dimension(1, 2, "stride"),
        "padding": per_dimension(0, 2, "padding"),
        "dilation": per_dimension(1, 2, "dilation"),
        "groups": data.draw(st.sampled_from([1, 2]), "groups"),
        "bias": data.draw(st.booleans(), "bias"),
        "padding_mode": data.draw(st.sampled_from(["zeros", "reflect", "replicate"]), "mode"),
        "r": data.draw(st.integers(1, 5), "r"),
    }
    torch.manual_seed(0)
    layer = make(dimensions, kernel, dtype=torch.float64, **options)
    x = make_input(layer)
    expected = formula(layer, x)
    assert_same_up_to_rounding(layer(x), expected)
    layer.lora_dropout.p = 1e-18  # two convolutions, but nothing is dropped and 1 - p is 1
    assert_same_up_to_rounding(layer(x), expected)
    assert_same_up_to_rounding(layer.eval()(x), expected)


@pytest.mark.parametrize(("dimensions", "kernel_size", "options"), CASES)
def test_gradcheck(dimensions, kernel_size, options, seed, device):
    layer = make(dimensions, kernel_size, device, dtype=torch.float64, **options)
    x = make_input(layer, batch=1)[..., :4].contiguous().requires_grad_()

    def run(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, *adapter(layer)), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *adapter(layer)), fast_mode=True)


def test_float32_adapters_over_a_bfloat16_base(seed, device):
    layer = make(2, 3, device, dtype=torch.bfloat16, lora_dtype=torch.float32)
    x = make_input(layer)
    delta = (layer.lora_B @ layer.lora_A).view(layer.weight.shape) * layer.scaling
    kernel = (layer.weight.float() + delta).to(torch.bfloat16)
    y = layer(x)
    assert torch.equal(y, layer.conv._conv_forward(x, kernel, layer.bias))
    y.sum().backward()
    assert [parameter.grad.dtype for parameter in adapter(layer)] == [torch.float32] * 2
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter(layer))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_with_a_full_precision_update(dtype, dropout, seed, device):
    layer = make(2, 3, device, lora_dropout=dropout).train(dropout > 0)
    x = make_input(layer)
    with torch.autocast(device.type, dtype=dtype):
        torch.manual_seed(seed)
        y = layer(x)
    torch.manual_seed(seed)
    bias, x_hat = layer.bias.to(dtype), layer.lora_dropout(x).to(dtype)
    x, delta = x.to(dtype), layer.delta_weight()
    if dropout:
        expected = layer.conv._conv_forward(x, layer.weight.to(dtype), bias)
        expected = expected + layer.conv._conv_forward(x_hat, delta.to(dtype), None)
    else:
        expected = layer.conv._conv_forward(x, layer.merged_weight().to(dtype), bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("training", [True, False])
def test_x_without_a_batch_and_an_empty_batch(training, seed, device):
    layer = make(2, 3, device, lora_dropout=0.1).train(training)
    x = make_input(layer, batch=1)
    torch.manual_seed(seed)
    y = layer(x)
    torch.manual_seed(seed)
    assert_same_up_to_rounding(layer(x[0]), y[0])
    assert layer(x[:0]).shape == (0, *y.shape[1:])


def test_x_of_any_strides(seed, device):
    layer = make(2, 3, device)
    x = make_input(layer)
    assert_same_up_to_rounding(layer(x.to(memory_format=torch.channels_last)), layer(x))
    wide = torch.randn(2, CIN, 14, 18, device=device)
    assert_same_up_to_rounding(layer(wide[..., ::2, ::2]), layer(wide[..., ::2, ::2].clone()))
    assert_same_up_to_rounding(layer(x[:1].expand(3, -1, -1, -1)), layer(x[[0, 0, 0]]))


@pytest.mark.parametrize(
    ("x", "error", "got"),
    [
        (None, TypeError, "NoneType"),
        ([1.0], TypeError, "list"),
        (torch.ones(1, CIN, 8, 8).to_sparse(), TypeError, "sparse_coo"),
        (torch.ones(1, CIN, 8, 8, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(1, CIN, 8, 8, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(1, CIN, 8, 8, dtype=torch.float64), ValueError, "float64"),
        (torch.ones(1, CIN + 1, 8, 8), ValueError, r"\[1, 5, 8, 8\]"),
        (torch.ones(8, 8), ValueError, r"\[8, 8\]"),
        (torch.ones(()), ValueError, r"\[\]"),
        (torch.ones(1, 1, CIN, 8, 8), ValueError, r"\[1, 1, 4, 8, 8\]"),
        (torch.ones(1, CIN, 8, 8, device="meta"), ValueError, "meta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize("training", [True, False])
def test_bad_x_names_x_and_the_layer(training, r, x, error, got, device):
    layer = make(2, 3, device, r=r).train(training)
    if isinstance(x, torch.Tensor) and not x.is_meta:
        x = x.to(device)
    with pytest.raises(error, match=rf"LoRAConv2d\({CIN}, {COUT}, .*: x must .*{got}"):
        layer(x)


# ---- dropout ----


@pytest.mark.parametrize("dimensions", KINDS)
def test_dropout_acts_on_the_update_alone_in_training_alone(dimensions, seed, device):
    layer = make(dimensions, 2, device, lora_dropout=0.4, merge_weights=False)
    x = make_input(layer)
    torch.manual_seed(seed)
    y = layer(x)
    torch.manual_seed(seed)
    x_hat = nn.functional.dropout(x, 0.4)
    assert not torch.equal(x_hat, x)
    expected = layer.conv(x) + layer.conv._conv_forward(x_hat, layer.delta_weight(), None)
    assert_same_up_to_rounding(y, expected)
    layer.eval()
    one_convolution = layer.conv._conv_forward(x, layer.merged_weight(), layer.bias)
    assert torch.equal(layer(x), one_convolution)


def test_dropout_keeps_the_expected_output(seed, device):
    layer = make(1, 1, device, dtype=torch.float64, lora_dropout=0.5)
    x = make_input(layer, batch=1).expand(4000, -1, -1)
    with torch.no_grad():
        y = layer(x)
    standard_error = y.std(0) / math.sqrt(len(y))
    assert ((y.mean(0) - layer.eval()(x[:1])[0]).abs() <= 6 * standard_error).all()


def test_gradients_under_dropout_are_those_of_the_mask(seed, device):
    layer = make(2, 3, device, dtype=torch.float64, lora_dropout=0.3)
    x = make_input(layer, batch=1)[..., :4, :4].contiguous().requires_grad_()

    def run(x, a, b):
        torch.manual_seed(seed)
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, *adapter(layer)), fast_mode=True)


# ---- merging ----


@pytest.mark.parametrize(("dimensions", "kernel_size", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_output_is_the_unmerged_one(dtype, dimensions, kernel_size, options, seed, device):
    layer = make(dimensions, kernel_size, device, dtype=dtype, **options)
    base = layer.weight.clone()
    x = make_input(layer)
    unmerged = layer(x)
    merged = layer.eval()(x)
    assert layer.merged
    assert not torch.equal(layer.complete_weight(), base)
    assert torch.equal(layer.weight, base)
    assert_same_up_to_rounding(merged, unmerged)
    assert torch.equal(layer.train().weight, base)


def test_train_restores_a_bf16_base_bit_for_bit_after_a_thousand_cycles(seed, device):
    layer = make(2, 3, device, dtype=torch.bfloat16)
    base, merged = layer.weight.clone(), layer.eval().complete_weight()
    for _ in range(1000):
        layer.train()
        assert torch.equal(layer.weight, base)
        layer.eval()
    assert torch.equal(layer.complete_weight(), merged)
    assert torch.equal(layer.train().weight, base)


def test_train_and_eval_return_the_layer():
    layer = make(1, 1)
    assert layer.eval() is layer
    assert layer.train() is layer


def test_state_dict_saved_while_merged_holds_the_base(seed, device):
    model = nn.Sequential(make(2, 3, device))
    base = model[0].weight.clone()
    x = make_input(model[0])
    y = model(x)
    saved = model.eval().state_dict()
    assert torch.equal(saved["0.conv.weight"].to(device), base)
    restored = nn.Sequential(make(2, 3, device)).eval()
    restored.load_state_dict(saved)
    assert_same_up_to_rounding(restored(x), y)
    assert torch.equal(restored.train()[0].weight, base)


def test_edits_while_merged_take_effect_and_keep_the_base(seed, device):
    layer = make(2, 3, device)
    base, x = layer.weight.clone(), make_input(layer)
    layer.eval()
    with torch.no_grad():
        layer.lora_A.mul_(-2)
    merged = layer(x)
    assert torch.equal(layer.train().weight, base)
    assert_same_up_to_rounding(merged, layer(x))


def test_eval_under_autocast_merges_a_full_precision_delta(seed, device):
    layer = make(2, 3, device)
    expected = layer.merged_weight()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        layer.eval()
    assert torch.equal(layer.complete_weight(), expected)


def test_tied_weight_is_left_alone_and_both_are_right(seed, device):
    model = nn.ModuleList([make(2, 3, device), nn.Conv2d(CIN, COUT, 3, device=device)])
    model[1].weight = model[0].conv.weight
    base, x = model[1].weight.clone(), make_input(model[0])
    outputs = [module(x) for module in model]
    model.eval()
    assert model[0].merged
    assert torch.equal(model[1].weight, base)
    assert model[0].weight is model[1].weight
    assert_same_up_to_rounding(model[0](x), outputs[0])
    assert torch.equal(model[1](x), outputs[1])


@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize("moved", ["before", "after"])
def test_offloaded_convolution_computes_on_the_fly(moved, r, seed, device):
    accelerate = pytest.importorskip("accelerate")
    layer = make(2, 3, device) if r else LoRAConv2d(CIN, COUT, 3, device=device)
    model, x = nn.Sequential(layer), make_input(layer)
    y = model(x)
    if moved == "after":
        model.eval()
    accelerate.cpu_offload(model, device)
    model.eval()
    for _ in range(2):
        with torch.no_grad():
            assert_same_up_to_rounding(model(x), y)
        assert layer.merged == (r == 0)


# ---- state dicts ----


def head_keys(layer):
    """The state dict of loralib's unreleased version: weight and bias twice."""
    state = layer.state_dict()
    return {"weight": state["conv.weight"], "bias": state["conv.bias"], **state}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dropped", [(), ("conv.weight", "conv.bias"), ("weight", "conv.bias")])
def test_load_takes_both_spellings_of_the_keys_strictly(dropped, merged, seed, device):
    source = nn.ModuleDict({"block": nn.Sequential(make(2, 3, device))})
    state = {
        f"block.0.{key}": value
        for key, value in head_keys(source["block"][0]).items()
        if key not in dropped
    }
    given = dict(state)
    target = nn.ModuleDict({"block": nn.Sequential(make(2, 3, device))}).train(not merged)
    target.load_state_dict(state, strict=True)
    assert state == given
    x = make_input(source["block"][0])
    y = source.train(not merged)["block"](x)
    assert torch.equal(target["block"](x), y)
    loaded = target.train()["block"][0].state_dict()
    for key, value in source.train()["block"][0].state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_load_takes_a_bias_alone_under_its_other_key(seed):
    layer = make(2, 3)
    result = layer.load_state_dict({"bias": torch.full((COUT,), 7.0)}, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(layer.bias, torch.full((COUT,), 7.0))


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t.double(), lambda t: t[:1]])
def test_load_of_spellings_that_differ_is_an_error_that_names_both(change, key, seed):
    layer = make(2, 3)
    state = head_keys(layer)
    state[key] = change(state[key])
    with pytest.raises(RuntimeError, match=rf"0\.{key} and 0\.conv\.{key} .* differ"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": t for name, t in state.items()})


def test_load_of_equal_spellings_that_hold_nan(seed):
    layer = make(2, 3)
    state = {key: value.clone() for key, value in head_keys(layer).items()}
    for key in ("weight", "conv.weight"):
        state[key][0] = torch.nan
    layer.load_state_dict(state)
    assert layer.weight[0].isnan().all()


@pytest.mark.parametrize("key", ["conv.weight", "lora_A"])
def test_load_without_a_key_is_still_an_error(key):
    layer = make(2, 3)
    state = layer.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        layer.load_state_dict(state)


# ---- wrapping ----


@pytest.mark.parametrize("by", ["ConvLoRA", "its own class"])
@pytest.mark.parametrize(("dimensions", "kernel_size", "options"), CASES)
def test_from_conv_takes_parameters_options_and_mode(
    dimensions, kernel_size, options, by, seed, device
):
    layer_class, plain_class = KINDS[dimensions]
    plain = plain_class(CIN, COUT, kernel_size, device=device, **options).eval()
    wrap = ConvLoRA.from_conv if by == "ConvLoRA" else layer_class.from_conv
    layer = wrap(plain, R, ALPHA, 0.1, lora_dtype=torch.float64)
    assert type(layer) is layer_class
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float64
    assert layer.lora_A.device == plain.weight.device
    assert layer.conv.extra_repr() == plain.extra_repr()
    x = make_input(layer)
    assert torch.equal(layer(x), plain(x))


def test_from_conv_refuses_what_it_would_compute_differently():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    refused = [
        Same(1, 1, 2),
        Standardised(1, 1, 2),
        nn.LazyConv2d(1, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)),
    ]
    for module in refused:
        with pytest.raises(TypeError, match=r"ConvLoRA: conv must be a plain nn\.Conv2d"):
            ConvLoRA.from_conv(module, R)


@pytest.mark.parametrize("conv", [None, nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 1)])
def test_from_conv_names_what_is_not_a_convolution(conv):
    expected = r"ConvLoRA: conv must be an nn\.Conv1d or nn\.Conv2d or nn\.Conv3d, got"
    with pytest.raises(TypeError, match=expected):
        ConvLoRA.from_conv(conv, R)


def test_from_conv_of_another_dimension_is_an_error():
    with pytest.raises(TypeError, match=r"LoRAConv2d: conv must be an nn\.Conv2d, got Conv1d"):
        LoRAConv2d.from_conv(nn.Conv1d(2, 2, 1), R)


# ---- PyTorch around it ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(clone, training, seed, device):
    layer = make(2, (3, 2), device, lora_dropout=0.2).train(training)
    twin = clone(layer)
    x = make_input(layer)
    outputs = []
    for module in (layer, twin):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    assert twin.merged == layer.merged
    assert torch.equal(twin.train().weight, layer.train().weight)


def test_cast_while_merged_casts_the_base(seed, device):
    layer = make(2, 3, device)
    base = layer.weight.clone()
    layer.eval().to(torch.bfloat16)
    assert layer.merged
    assert torch.equal(layer.complete_weight(), layer.merged_weight())
    assert torch.equal(layer.train().weight, base.to(torch.bfloat16))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_meta_then_to_empty_then_reset(layer_class, seed, device):
    layer = layer_class(CIN, COUT, 3, R, ALPHA, device="meta")
    x = make_input(layer)
    assert layer(x).is_meta
    shape = layer(x).shape
    layer.to_empty(device=device).reset_parameters()
    x = make_input(layer)
    assert layer(x).shape == shape
    assert torch.equal(layer(x), layer.conv(x))
    assert layer.lora_A.std() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_into_one_graph(dropout, seed, device):
    layer = make(2, 3, device, lora_dropout=dropout)
    x = make_input(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (compiled, layer):
        torch.manual_seed(seed)
        y = module(x)
        results.append([y, *torch.autograd.grad(y.sum(), adapter(layer))])
    for actual, expected in zip(*results, strict=True):
        assert_same_up_to_rounding(actual, expected)
