"""The guard of patch_peft() on one layer: what it takes, and what it leaves to PEFT's forward."""

import functools
import re

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.integrations.peft import guard
from tests.op_calls import Calls
from tests.peft_models import assert_as_without, both_bases, lora_layer

pytestmark = pytest.mark.usefixtures("unpatched")


def disable_casting(layer):
    layer.cast_input_dtype_enabled = False


def add_active(layer):
    # So rare a zero that both calls give the same.
    layer.update_layer("other", 2, 2, peft.LoraConfig(lora_dropout=1e-12))
    layer.set_adapter(["default", "other"])


def quantised_weight(layer):
    class Params4bit(nn.Parameter):
        pass

    layer.base_layer.weight = Params4bit(layer.base_layer.weight.data)


def hook(path, register="register_forward_hook"):
    return lambda layer: getattr(layer.get_submodule(path), register)(lambda *args: None)


def own_forward(path):
    def change(layer):
        module = layer.get_submodule(path)
        module.forward = lambda x: type(module).forward(module, x) * 2

    return change


def replace(path, make):
    def change(layer):
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, make(layer.get_submodule(path)))

    return change


def renamed(kind):
    class Subclass(kind):
        pass

    def change(module):
        module.__class__ = Subclass
        return module

    return change


def parametrized(path):
    return lambda layer: parametrize.register_parametrization(
        layer.get_submodule(path), "weight", nn.Identity()
    )


def scaled_by(value):
    def change(layer):
        layer.scaling["default"] = value

    return change


A, B, DROPOUT = "lora_A.default", "lora_B.default", "lora_dropout.default"
LEFT_TO_PEFT = {
    "disabled": (lambda layer: layer.enable_adapters(False), "adapters are disabled"),
    "merged": (lambda layer: layer.merge(), "adapters are merged"),
    "no casting": (disable_casting, "casting of its input is disabled"),
    "two active": (add_active, "2 of its adapters are active"),
    "none active": (lambda layer: layer.set_adapter([]), "0 of its adapters are active"),
    "weight subclass": (quantised_weight, "base_layer.weight is a Params4bit"),
    "base subclass": (replace("base_layer", renamed(nn.Linear)), "base_layer is a Subclass"),
    "A subclass": (replace(A, renamed(nn.Linear)), "lora_A is a Subclass"),
    "B subclass": (replace(B, renamed(nn.Linear)), "lora_B is a Subclass"),
    "dropout subclass": (replace(DROPOUT, renamed(nn.Identity)), "lora_dropout is a Subclass"),
    "other dropout": (replace(DROPOUT, lambda _: nn.AlphaDropout(0.0)), "is a AlphaDropout"),
    "full dropout": (replace(DROPOUT, lambda _: nn.Dropout(1.0)), r"is Dropout\(p=1.0"),
    "dropout in place": (replace(DROPOUT, lambda _: nn.Dropout(0.0, True)), "inplace=True"),
    "base hook": (hook("base_layer"), "base_layer has hooks"),
    "A hook": (hook(A), "lora_A has hooks"),
    "A pre-hook": (hook(A, "register_forward_pre_hook"), "lora_A has hooks"),
    "B backward hook": (hook(B, "register_full_backward_hook"), "lora_B has hooks"),
    "B backward pre-hook": (hook(B, "register_full_backward_pre_hook"), "lora_B has hooks"),
    "dropout hook": (hook(DROPOUT), "lora_dropout has hooks"),
    "base forward": (own_forward("base_layer"), "base_layer has a forward of its own"),
    "A forward": (own_forward(A), "lora_A has a forward of its own"),
    "B forward": (own_forward(B), "lora_B has a forward of its own"),
    "base parametrized": (parametrized("base_layer"), "base_layer is a ParametrizedLinear"),
    "A parametrized": (parametrized(A), "lora_A is a ParametrizedLinear"),
    "base pruned": (
        lambda layer: prune.random_unstructured(layer.base_layer, "weight", 0.5),
        "base_layer has hooks",
    ),
    "float64 adapter": (
        lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
        "its adapter is float64 and its base torch.float32",
    ),
    "bias of one element": (
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(1))),
        r"base_layer.bias \[1\] does not fit weight \[12, 16\]",
    ),
    "infinite scaling": (scaled_by(float("inf")), "scaling is inf"),
    "scaling per column": (scaled_by(torch.ones(12)), r"tensor of shape \[12\]"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_guard_leaves_what_it_does_not_know_to_pefts_forward(change, reason, seed, device):
    layer = lora_layer(device).train()
    change(layer)
    x = torch.randn(3, 16, device=device)
    expected = layer(x)
    patch_peft()
    with Calls() as calls:
        actual = layer(x)
    assert calls.fused == 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    (row,) = report(layer)
    assert (row.fused, row.algorithm) == (False, None)
    assert re.search(reason, row.reason), row.reason


def replace_forward(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight))


def test_replaced_forward_of_linear_is_called(monkeypatch, seed, device):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)
    replace_forward(monkeypatch)
    expected = layer(x)
    patch_peft()
    assert torch.equal(layer(x), expected)
    assert report(layer)[0].reason == "Linear.forward has been replaced"


def test_hooks_on_all_modules_are_called(seed, device, patched):
    layer, seen = lora_layer(device), []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args[0]))
    try:
        layer(torch.randn(3, 16, device=device))
    finally:
        handle.remove()
    assert layer.lora_A["default"] in seen


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x[0]),
    "forward_ad": lambda f, x: forward_mode(f, x),
    "trace": lambda f, x: torch.jit.trace(f, x)(x),
}


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_transforms_of_functions(transform, seed, device):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)
    expected = transform(layer, x)
    patch_peft()
    assert torch.equal(transform(layer, x), expected)


BAD_CALLS = {
    "shape": (lambda layer: None, torch.randn(3, 15)),
    "scalar": (lambda layer: None, torch.tensor(1.0)),
    "dtype": (lambda layer: None, torch.randn(3, 16, dtype=torch.float64)),
    "integers": (lambda layer: None, torch.ones(3, 16, dtype=torch.int64)),
    "device": (lambda layer: None, torch.empty(3, 16, device="meta")),
    "no tensor": (lambda layer: None, [1.0] * 16),
    "argument": (lambda layer: None, torch.randn(3, 16), {"surplus": 1}),
    "base dtype": (lambda layer: layer.base_layer.bfloat16(), torch.randn(3, 16)),
    "bias dtype": (
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(12).double())),
        torch.randn(3, 16),
    ),
    "float8": (
        lambda layer: layer.base_layer.to(torch.float8_e4m3fn),
        torch.ones(3, 16).to(torch.float8_e4m3fn),
    ),
    "weight without elements": (  # of ZeRO-3, outside of a forward
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.empty(0))),
        torch.randn(3, 16),
    ),
    "B dtype": (lambda layer: layer.lora_B.bfloat16(), torch.randn(3, 16)),
    "A shape": (replace(A, lambda _: nn.Linear(15, 4, bias=False)), torch.randn(3, 16)),
    "B shape": (replace(B, lambda _: nn.Linear(3, 12, bias=False)), torch.randn(3, 16)),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_are_those_of_peft(case, seed):
    change, x, kwargs = (*case, {})[:3]
    layer = lora_layer("cpu")
    change(layer)
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever it is, it is to stay
        layer(x, **kwargs)
    patch_peft()
    with pytest.raises(type(expected.value)) as actual:
        layer(x, **kwargs)
    assert str(actual.value) == str(expected.value)


def solve_alone(layer, x):
    """y and the gradients of x, A and B."""
    leaf = x.to(layer.weight.dtype).requires_grad_()
    y = layer(leaf)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    grads = torch.autograd.grad(y.square().sum(), [leaf, *factors])
    return dict(zip(["y", "x", "a", "b"], [y.detach(), *grads], strict=True))


@both_bases
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 0, 16), (2, 3, 2, 16)])
def test_shapes_of_x(shape, bias, conv1d, seed, device):
    x = torch.randn(shape, device=device)
    layer = lora_layer(device, conv1d=conv1d, bias=bias)
    assert_as_without(layer, functools.partial(solve_alone, x=x), fused=1)


@both_bases
@pytest.mark.parametrize("algorithm", ["fused", "addmm"], indirect=True)
def test_kernels(algorithm, conv1d, seed, device):
    x = torch.randn(5, 16, device=device)
    layer = lora_layer(device, conv1d=conv1d)
    assert report(layer)[0].algorithm is None
    patch_peft()
    assert report(layer)[0].algorithm == algorithm
    unpatch_peft()
    assert_as_without(layer, functools.partial(solve_alone, x=x), fused=1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode, seed, device):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)

    def run(layer):
        with mode():
            return {"y": layer(x.to(layer.weight.dtype)).clone()}

    assert_as_without(layer, run, fused=1)


def test_meta_tensors(patched):
    layer = lora_layer("meta")
    y = layer(torch.empty(2, 3, 16, device="meta"))
    assert (y.shape, y.device.type, y.dtype) == ((2, 3, 12), "meta", torch.float32)


def test_output_may_be_changed_in_place(seed, device, patched):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    y = layer(x)
    (actual,) = torch.autograd.grad(torch.relu_(y).sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_x(seed, device):
    layer = lora_layer(device)
    x = torch.nested.nested_tensor([torch.randn(m, 16, device=device) for m in (2, 3)])
    expected = layer(x)
    patch_peft()
    assert all(map(torch.equal, layer(x).unbind(), expected.unbind()))


def test_device_without_operators(monkeypatch, seed, device, patched):
    monkeypatch.setattr(guard, "DEVICES", ("npu",))
    layer = lora_layer(device)
    with Calls() as calls:
        layer(torch.randn(3, 16, device=device))
    assert calls.fused == 0
    assert report(layer)[0].reason == f"there are no operators for {device.type}"


def test_peft_before_it_had_variants(seed, device, patched):
    layer = lora_layer(device)
    del layer.lora_variant
    assert report(layer)[0].reason == "PEFT is older than 0.16"


def test_weights_on_several_devices(seed, patched):
    layer = lora_layer("cpu")
    layer.lora_A.to("meta")
    with Calls() as calls:
        layer(torch.randn(3, 16))
    assert calls.fused == 0
    assert report(layer)[0].reason == "its weights are on several devices"


def test_parameters_may_be_plain_tensors_as_fsdp_and_data_parallel_have_them(seed, device, patched):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)
    expected = layer(x)
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        weight = module.weight.detach()
        del module.weight
        module.weight = weight
    with Calls() as calls:
        assert torch.equal(layer(x), expected)
    assert calls.fused == 1


def test_disabled_casting_by_pefts_helper(seed, device):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)

    def run(layer):
        with disable_input_dtype_casting(layer):
            return {"y": layer(x.to(layer.weight.dtype)).detach()}

    assert_as_without(layer, run, fused=0)
