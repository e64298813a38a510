"""Every layer on tensors of other classes and devices: quantised, nested, lazy."""

import copy
import functools

import pytest
import torch
import torch._lazy.ts_backend
from torch import nn
from torch.nn import functional as F

import lora_kernels
from lora_kernels import LoRAConv2d, LoRAEmbedding, LoRALinear, LoRAMergedLinear
from tests.layers.cases import build
from tests.op_calls import Calls
from tests.tensor_classes import Halves

every_merge = pytest.mark.parametrize("merge_weights", [True, False], ids=["merging", "on the fly"])


def quantised(module):
    module.weight = nn.Parameter(Halves(module.weight.detach()), requires_grad=False)
    return module


# ---- weights of another class ----

MAKERS = {
    "linear": lambda **kw: LoRALinear(12, 20, r=3, **kw),
    "merged_linear": lambda **kw: LoRAMergedLinear(12, 24, r=2, enable_lora=[True, False], **kw),
    "embedding": lambda **kw: LoRAEmbedding(12, 20, r=3, **kw),
    "conv": lambda **kw: LoRAConv2d(4, 6, 3, r=2, **kw),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def built(make, device, **options):
    return build(make, device, dtype=torch.float64, **options)


def example(layer, device):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(12, (5, 3), device=device)
    shape = (5, 4, 6, 6) if isinstance(layer, LoRAConv2d) else (5, 12)
    return torch.randn(shape, dtype=torch.float64, device=device)


def output_and_gradients(layer, x):
    leaf = x.clone().requires_grad_(x.is_floating_point())
    wanted = [layer.lora_A, layer.lora_B] + [leaf] * leaf.requires_grad
    y = layer(leaf)
    return y.detach(), *torch.autograd.grad(y.pow(2).sum(), wanted)


@every_maker
def test_weight_of_another_class(make, seed, device):
    plain, other = built(make, device), built(make, device)
    other.load_state_dict(plain.state_dict())
    quantised(other.weight_owner())
    x = example(plain, device)
    torch.testing.assert_close(output_and_gradients(plain, x), output_and_gradients(other, x))
    torch.testing.assert_close(plain.eval()(x), other.eval()(x))
    assert plain.merged
    assert not other.merged
    with pytest.raises(TypeError, match=rf"{type(other).__name__}.* weight is a Halves"):
        other.merged_weight()


def test_apply_lora_on_quantised_weights_and_what_report_says(seed, device):
    model = nn.Sequential(nn.Linear(12, 12), quantised(nn.Linear(12, 8))).to(device)
    x = torch.randn(3, 12, device=device)
    expected = model(x)
    lora_kernels.apply_lora(model, r=2, lora_alpha=2)
    torch.testing.assert_close(model(x), expected)
    with Calls() as calls:
        model(x)
    assert calls.fused == 1
    plain, other = lora_kernels.report(model)
    assert plain.fused
    assert not other.fused
    assert other.algorithm is None
    assert other.reason == "it runs PyTorch's operators: weight is a Halves"
    with pytest.warns(UserWarning, match="1 .its tensors are computed, or not plain"):
        lora_kernels.merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_apply_lora_refuses_weights_of_integers_before_anything_changes(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"1 \(Linear\) cannot get .* its weight is torch.int8"):
        lora_kernels.apply_lora(model, r=2, lora_alpha=2)
    assert dict(model.named_modules()) == before
    assert model[0].weight.requires_grad


def test_autocast_with_a_weight_of_another_class(seed, device):
    layers = [build(lambda **kw: LoRALinear(12, 20, r=3, **kw), device) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    quantised(layers[1])
    x = torch.randn(5, 12, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        plain, other = (layer(x) for layer in layers)
    assert plain.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(plain, other, rtol=2**-7, atol=2**-6)  # two roundings of x


# ---- batches of unlike lengths ----

every_jagged = pytest.mark.parametrize("name", [name for name in MAKERS if name != "conv"])


def parts(layer, device):
    if isinstance(layer, LoRAEmbedding):
        return [torch.randint(12, (m,), device=device) for m in (3, 5)]
    return [torch.randn(m, 12, dtype=torch.float64, device=device) for m in (3, 5)]


@every_jagged
@every_merge
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jagged_batches(training, merge_weights, name, seed, device):
    layer = built(MAKERS[name], device, merge_weights=merge_weights).train(training)
    values = parts(layer, device)
    batch = torch.nested.nested_tensor(values, layout=torch.jagged, device=device)
    y = layer(batch)
    torch.testing.assert_close(y.values(), layer(batch.values()))
    torch.testing.assert_close((y + y).unbind()[1], layer(values[1]) * 2)
    if training:
        grads = [
            torch.autograd.grad(out.pow(2).sum(), [layer.lora_A, layer.lora_B])
            for out in (y.values(), layer(batch.values()))
        ]
        torch.testing.assert_close(*grads)


def test_jagged_batch_is_one_call_of_the_op_and_has_its_mask(seed, device):
    x = [torch.randn(m, 8, device=device, requires_grad=True) for m in (3, 5)]
    batch = torch.nested.as_nested_tensor(x, layout=torch.jagged)
    w, a, b = (torch.randn(*s, device=device) for s in ((6, 8), (2, 8), (6, 2)))
    own = torch.tensor([7], device=device)
    with Calls() as calls:
        y = lora_kernels.lora_linear(batch, w, a, b, dropout_p=0.5, seed=own)
    assert calls.fused == 1
    whole = lora_kernels.lora_linear(torch.cat(x), w, a, b, dropout_p=0.5, seed=own)
    assert torch.equal(y.values(), whole)
    grads = [torch.autograd.grad(out.sum(), x) for out in (y.values(), whole)]
    torch.testing.assert_close(*grads)
    residual = batch + F.linear(y, torch.ones(8, 6, device=device))  # of the same lengths as x
    assert residual.shape == batch.shape


def test_jagged_batches_of_other_widths_are_named(device):
    layer = LoRALinear(12, 20, r=3, device=device)
    wide = torch.nested.nested_tensor([torch.randn(3, 13)] * 2, layout=torch.jagged, device=device)
    narrow = torch.nested.nested_tensor([torch.randn(3, 12)] * 2, layout=torch.jagged)
    for batch in (wide, narrow.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"LoRALinear.* x must have shape \[\.\.\., 12\]"):
            layer(batch)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@every_merge
def test_nested_batches_of_strided_layout(merge_weights, seed, device):
    layer = built(MAKERS["linear"], device, merge_weights=merge_weights, lora_dropout=0.3).eval()
    values = parts(layer, device)
    y = layer(torch.nested.nested_tensor(values))
    for one, x in zip(y.unbind(), values, strict=True):
        torch.testing.assert_close(one, layer(x))
    with pytest.raises(TypeError, match=r"lora_linear: x must .*torch\.jagged"):
        lora_kernels.lora_linear(
            torch.nested.nested_tensor(values), layer.weight, layer.lora_A, layer.lora_B,
            dropout_p=0.3, seed=torch.tensor([7], device=device),
        )  # fmt: skip


# ---- other devices ----


@pytest.mark.parametrize(
    "op",
    [
        "lora_linear_forward",
        "lora_linear_backward",
        "lora_shared_linear_forward",
        "lora_shared_linear_backward",
        "lora_grouped_linear_forward",
        "lora_grouped_linear_backward",
        "dora_forward",
        "dora_backward",
        "add_lora",
        "dense_4bit",
    ],
)
@pytest.mark.parametrize("key", ["MPS", "XPU", "HPU", "PrivateUse1", "Lazy", "XLA", "MTIA"])
def test_ops_have_a_kernel_on_every_device(op, key):  # fmt: skip
    name = f"lora_kernels::{op}"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)


@functools.cache
def lazy_device():
    """A device with neither kernels nor autocast, which every build of PyTorch has."""
    torch._lazy.ts_backend.init()
    return torch.device("lazy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the lazy device computes on the CPU")
@every_maker
def test_layer_on_another_device(make, seed):
    layer, lazy = built(make, torch.device("cpu")), lazy_device()
    x = example(layer, "cpu")
    expected, merged = output_and_gradients(layer, x), copy.deepcopy(layer).eval()(x)
    layer.to(lazy)
    results = [result.cpu() for result in output_and_gradients(layer, x.to(lazy))]
    torch.testing.assert_close(results, list(expected))
    torch.testing.assert_close(layer.eval()(x.to(lazy)).cpu(), merged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the lazy device computes on the CPU")
def test_dropout_on_another_device_has_the_same_mask(seed):
    operands = [torch.randn(s, dtype=torch.float64) for s in ((5, 12), (20, 12), (3, 12), (20, 3))]

    def on(device):
        own = torch.tensor([7]).to(device)
        moved = [operand.to(device) for operand in operands]
        return lora_kernels.lora_linear(*moved, dropout_p=0.25, seed=own).cpu()

    torch.testing.assert_close(on(lazy_device()), on("cpu"))
    layer = LoRALinear(12, 20, r=3, lora_dropout=0.25).to(lazy_device())
    assert layer(operands[0].float().to(lazy_device())).cpu().shape == (5, 20)
