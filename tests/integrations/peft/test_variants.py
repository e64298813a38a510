"""PEFT's variants under patch_peft(): the same numbers by lora_linear, or PEFT's code and why."""

import re
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import variants as upstream
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.integrations.peft import variants
from lora_kernels.quantization import find
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.quantized import quantised

pytestmark = pytest.mark.usefixtures("unpatched")
K, N, R = 24, 36, 4
KASA = {"kasa_config": peft.KasaConfig()}
MICA = {"init_lora_weights": "mica"}


def blocks(factor, count=2):
    """BD-LoRA of one layer, named lin; factor: "a", "b" or neither."""
    names = {f"target_modules_bd_{factor}": ["lin"]} if factor else {"match_strict": False}
    return {"use_bdlora": peft.BdLoraConfig(nblocks=count, **names)}


class Model(nn.Module):
    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def layer_of(*adapters, base=None, dtype=torch.float64, lora_dtype=None, device="cpu"):
    """PEFT's layer with these active adapters, each a dict of options, and random values."""
    model = Model(nn.Linear(K, N) if base is None else base)
    model.is_loaded_in_4bit = "4bit" in type(model.lin).__name__
    model.is_loaded_in_8bit = "8bit" in type(model.lin).__name__
    names = [f"adapter{i}" for i in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lora_bias over a base without a bias
        for name, options in zip(names, adapters, strict=True):
            options = {"r": R, "lora_alpha": 6, "target_modules": ["lin"], **options}
            config = peft.LoraConfig(fan_in_fan_out=isinstance(base, Conv1D), **options)
            if name == names[0]:
                wrapped = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
            else:
                wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    wrapped.base_model.set_adapter(names)
    if base is None or isinstance(base, Conv1D):
        wrapped.to(dtype)
    layer = wrapped.base_model.model.lin.to(device).train()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=lora_dtype or dtype)
    return layer


def solve(layer, seed=0, dtype=torch.float64):
    """y and the gradients of x and of all that trains."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(3, 7, n, generator=generator, dtype=torch.float64) for n in (K, N))
    device = layer.lora_A["adapter0"].weight.device
    leaves = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    leaves["x"] = x.to(device, dtype).requires_grad_()
    y = layer(leaves["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_as_peft(layer, calls, reason):
    """In float64 patched and not are the same, by so many calls of the operation."""
    expected = solve(layer)
    patch_peft()
    with Calls() as seen:
        actual = solve(layer)
    (row,) = report(layer)
    unpatch_peft()
    assert (seen.fused, row.fused) == (calls, bool(calls))
    assert re.search(reason, row.reason), row.reason
    assert actual.keys() == expected.keys()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if calls else {"rtol": 0, "atol": 0}
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name, **tolerance)
    return expected.keys() - {"x", "y"}


TAKEN = {
    "lora_bias": ([{"lora_bias": True}], "lora_B.bias added"),
    "MiCA": ([MICA], "^MiCA"),
    "KaSA": ([KASA], "KaSA"),
    "KaSA, lora_bias": ([{**KASA, "lora_bias": True}], "KaSA.*lora_B.bias added"),
    "BD-LoRA, B": ([blocks("b")], "lora_B in blocks"),
    "BD-LoRA, A": ([blocks("a")], "lora_A in blocks"),
    "BD-LoRA, neither": ([blocks("")], ""),
    "two": ([{}, {"r": 3}], "^2 adapters in one"),
    "two, one scaling": ([{}, {"r": 2, "lora_alpha": 3}], "^2 adapters in one"),
    "two with KaSA": ([KASA, {**KASA, "r": 3}], "^2 adapters in one; KaSA"),
    "mixed": ([{"lora_bias": True}, blocks("a"), MICA, {"lora_bias": True}],
              "^4 adapters in one; lora_B.bias added to the bias; lora_A in blocks; MiCA"),
}  # fmt: skip
BASES = {"Linear": lambda: None, "no bias": lambda: nn.Linear(K, N, bias=False),
         "Conv1D": lambda: Conv1D(N, K)}  # fmt: skip


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("adapters", "reason"), TAKEN.values(), ids=TAKEN)
def test_y_and_the_gradients_of_all_that_trains_are_pefts(adapters, reason, base, seed, device):
    base = base()
    if isinstance(base, Conv1D) and any({"kasa_config", "use_bdlora"} & {*o} for o in adapters):
        pytest.skip("PEFT's KaSA and BD-LoRA do not support Conv1D")
    layer = layer_of(*adapters, base=base, device=device).double()
    trained = assert_as_peft(layer, 1, reason)
    factors = sum(1 if "init_lora_weights" in options else 2 for options in adapters)
    extra = sum(("lora_bias" in options) + ("kasa_config" in options) for options in adapters)
    assert len(trained) == factors + extra


@pytest.mark.parametrize(("adapters", "reason"), [TAKEN[name] for name in ("lora_bias", "two")])
def test_tensor_as_scaling(adapters, reason, seed):
    layer = layer_of(*adapters)
    layer.scaling["adapter0"] = torch.tensor(0.75)
    assert_as_peft(layer, 1, reason)


@pytest.mark.parametrize("name", ["lora_bias", "KaSA", "BD-LoRA, B", "BD-LoRA, A"])
def test_dropout_is_that_of_the_adapter(name, seed, patched):
    (options,), _ = TAKEN[name]
    layer = layer_of({**options, "lora_dropout": 0.25})
    assert variants.folded_of(layer).operands.dropout_p == 0.25
    x = torch.randn(3, K, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    actual = layer(x)
    unpatch_peft()
    torch.testing.assert_close(actual, layer(x), rtol=1e-12, atol=1e-12)


def test_several_with_dropout_run_in_eval(seed):
    layer = layer_of({"lora_dropout": 0.25}, {"lora_bias": True})
    patch_peft()
    assert report(layer)[0].reason == "2 of its adapters are active, and each has a dropout mask"
    unpatch_peft()
    assert_as_peft(layer.eval(), 1, "^2 adapters in one")


def test_kasa_after_its_first_forward_which_truncates(seed, patched):
    layer, x = layer_of(KASA), torch.randn(3, K, dtype=torch.float64)
    layer._lora_kasa_truncation_deferred.add("adapter0")
    (row,) = report(layer)
    assert (row.fused, row.reason) == (
        False, "its adapter's first forward is to truncate the base weight (KaSA)",
    )  # fmt: skip
    before = layer.base_layer.weight.clone()
    with Calls() as calls:
        first = layer(x)
    assert calls.fused == 0
    assert not torch.equal(layer.base_layer.weight, before)
    with Calls() as calls:
        second = layer(x)
    assert calls.fused == 1
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)  # PEFT truncates in float32


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lora_bias", "KaSA", "BD-LoRA, B", "BD-LoRA, A", "two"])
def test_bfloat16(name, lora_dtype, seed):
    layer = layer_of(*TAKEN[name][0], dtype=torch.bfloat16, lora_dtype=lora_dtype)
    expected = solve(layer, dtype=torch.bfloat16)
    patch_peft()
    actual = solve(layer, dtype=torch.bfloat16)
    unpatch_peft()
    exact = solve(layer.double(), dtype=torch.float64)
    for key in expected:
        assert actual[key].dtype == expected[key].dtype
        assert_close(actual[key], exact[key], expected[key], key)


@pytest.mark.parametrize("autocast", [False, True])
def test_small_lora_bias_is_not_rounded_off(autocast, seed, patched):
    """Beside a bias of 1 bfloat16 has no 1.001, and outputs near zero have."""
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = layer_of({"lora_bias": True}, dtype=dtype, lora_dtype=torch.float32)
    layer.base_layer.bias.data.fill_(1)
    layer.base_layer.weight.data.fill_(-1 / K)
    layer.lora_B["adapter0"].weight.data.zero_()
    layer.lora_B["adapter0"].bias.data.fill_(0.001)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(torch.ones(2, K, dtype=dtype))
    base = layer.base_layer.weight.to(torch.bfloat16).double().sum(1) + 1
    torch.testing.assert_close(y[0].double(), base + 0.0015, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("name", ["lora_bias", "two", "mixed"])
def test_over_quantised_bases(name, kind, seed):
    if kind.startswith("torchao") and name != "two":
        pytest.skip("TorchaoLoraLinear does not support lora_bias yet")
    adapters = {"mixed": [{}, {"lora_bias": True}]}.get(name, TAKEN[name][0])
    layer = layer_of(*adapters, base=quantised(kind, N, K), dtype=torch.float32)
    expected = solve(layer, dtype=torch.float32)
    patch_peft()
    (row,) = report(layer)
    assert row.fused, row.reason
    with Calls() as calls:
        actual = solve(layer, dtype=torch.float32)
    unpatch_peft()
    assert "add_lora" in "".join(calls.names) or calls.fused
    dense = nn.Linear(K, N, dtype=torch.float64)
    dense.weight.data = find(layer.base_layer).dense(torch.float32).double()
    dense.bias.data = layer.base_layer.bias.detach().double()
    dense.requires_grad_(False)
    exact_layer = layer_of(*adapters)
    exact_layer.base_layer = dense
    own = dict(layer.named_parameters())
    for key, parameter in exact_layer.named_parameters():
        if "lora_" in key:
            parameter.data = own[key].detach().double()
    exact = solve(exact_layer)
    assert actual.keys() == expected.keys() == exact.keys()
    for key in actual:
        assert_close(actual[key], exact[key], expected[key], key)


# ---- what runs PEFT's own code ----


class Subclass(upstream.MiCALinearVariant):
    """Another variant."""


def replace_variant(layer):
    layer.lora_variant["adapter0"] = Subclass()


def own_forward(layer):
    variant = layer.lora_variant["adapter0"]
    variant.forward = upstream.MiCALinearVariant.forward


def hook(kind):
    return lambda layer: getattr(layer, kind)["adapter0"].register_forward_hook(lambda *args: None)


def diagonal(values):
    def change(layer):
        layer.lora_diag["adapter0"] = nn.Parameter(values)

    return change


def bias_of_a(layer):
    layer.lora_A["adapter0"].bias = nn.Parameter(torch.randn(R, dtype=torch.float64))


def other_dtype(layer):
    for kind in (layer.lora_A, layer.lora_B):
        kind["adapter1"].float()


LEFT = {
    "subclass": ([MICA], replace_variant, "its adapter is a Subclass"),
    "forward of its own": ([MICA], own_forward, "its adapter is a MiCALinearVariant"),
    "B hook": ([{"lora_bias": True}], hook("lora_B"), "lora_B has hooks"),
    "A hook": ([KASA], hook("lora_A"), "lora_A has hooks"),
    "hook on blocks": ([blocks("b")], hook("lora_B"), "lora_B has hooks"),
    "diagonal of 1": ([KASA], diagonal(torch.ones(1).double()), r"lora_diag is .* \[1\]"),
    "diagonal in float32": ([KASA], diagonal(torch.ones(R)), "lora_diag is torch.float32"),
    "bias of A": ([{"lora_bias": True}], bias_of_a, "lora_A has a bias"),
    "two, hook": ([{}, {}], hook("lora_A"), "lora_A has hooks"),
    "two dtypes": ([{}, {}], other_dtype, "its adapters have several dtypes|float32"),
    "two, B in blocks": ([{}, blocks("b")], lambda layer: None, "one of them with lora_B in"),
    "beside DoRA": ([{}, {"use_dora": True}], lambda layer: None, "DoraLinearVariant|magnitude"),
    "VeLoRA": (
        [{"velora_config": peft.VeloraConfig(num_groups=4, init_type="random")}],
        lambda layer: layer.double(),
        "its adapter is a VeloraLinearVariant",
    ),
}


@pytest.mark.parametrize(("adapters", "change", "reason"), LEFT.values(), ids=LEFT)
def test_guard_leaves_the_unknown_to_peft(adapters, change, reason, seed):
    layer = layer_of(*adapters)
    change(layer)
    assert_as_peft(layer, 0, reason)


def test_variant_with_another_source_is_unknown(seed, monkeypatch):
    monkeypatch.setitem(variants._KNOWN_FORWARDS, "MiCALinearVariant", "0" * 64)
    assert_as_peft(layer_of(MICA), 0, "its adapter is a MiCALinearVariant")


def test_replaced_forward_of_a_variant_is_called(seed, patched, monkeypatch):
    layer, x = layer_of(MICA), torch.randn(3, K, dtype=torch.float64)
    replaced = staticmethod(lambda module, active_adapter, x, result, **kwargs: result * 2)
    monkeypatch.setattr(upstream.MiCALinearVariant, "forward", replaced)
    torch.testing.assert_close(layer(x), layer.base_layer(x) * 2)
    assert report(layer)[0].reason == "MiCALinearVariant.forward has been replaced"


@pytest.mark.parametrize("options", [{"lora_bias": True}, KASA, MICA])
def test_further_arguments_run_pefts_code(options, seed, patched):
    layer, x = layer_of(options), torch.randn(2, K, dtype=torch.float64)
    expected = layer(x)
    for kwargs in ({"alora_offsets": None}, {"adapter_names": ["adapter0"] * 2}):
        with Calls() as calls:
            y = layer.eval()(x, **kwargs)
        assert calls.fused == 0
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_a_break(dtype, seed, patched):
    layer = layer_of({"lora_bias": True}, {"r": 3}, dtype=dtype, lora_dtype=torch.float32)
    x = torch.randn(5, K, dtype=dtype)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 0, K), (2, 1, 3, K)])
def test_shapes_of_x_under_a_bias_added_to_16_bits(shape, seed):
    layer = layer_of({"lora_bias": True}, dtype=torch.bfloat16, lora_dtype=torch.float32)
    bias = layer.lora_B["adapter0"].bias
    x = torch.randn(shape, dtype=torch.bfloat16)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.float().sum(), bias)
    patch_peft()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.float().sum(), bias)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.1)
    torch.testing.assert_close(grad, expected_grad)
