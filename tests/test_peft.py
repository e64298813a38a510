"""patch_peft(): what PEFT does without the patch it does with it, and fused where it should be."""

import collections
import copy
import functools
import inspect
import math
import pickle
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from functorch.compile import make_boxed_func
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from lora_kernels import ops, patch_peft, report, unpatch_peft
from tests.dispatch import Calls
from tests.tiny_models import BASES, LAYERS, TARGETS, randomise, tiny_llama
from tests.tolerance import assert_close

UPSTREAM = PeftLinear.forward

both_models = pytest.mark.parametrize("family", list(BASES))


@pytest.fixture(autouse=True)
def _unpatched():
    assert PeftLinear.forward is UPSTREAM
    yield
    unpatch_peft()
    assert PeftLinear.forward is UPSTREAM


@pytest.fixture
def patched():
    patch_peft()


def config(family, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], **options}
    return peft.LoraConfig(fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **options)


def with_lora(family, device, *, base=None, **options):
    base = BASES[family]() if base is None else base
    return randomise(peft.get_peft_model(base, config(family, **options))).to(device)


def step(model, **kwargs):
    """logits, loss and the gradients of one training step."""
    model.zero_grad()
    ids = tokens(model)
    y = model(input_ids=ids, **kwargs).logits
    loss = nn.functional.cross_entropy(y.flatten(0, 1), ids.flatten())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "loss": loss.detach(), **grads}


def logits(model, **kwargs):
    with torch.no_grad():
        return {"logits": model(input_ids=tokens(model), **kwargs).logits}


def tokens(model):
    return torch.arange(28, device=next(model.parameters()).device).view(4, 7) * 5 % 13


def assert_as_without(model, run, *, fused):
    """run(model) gives the same results with the patch, by so many calls of the one operation.

    The model as a whole is compared in float64, to the accuracy of float32: rounding in fewer bits
    grows from layer to layer, with or without the patch. In the dtypes that it has, every layer is
    compared on the inputs that it meets. run may change the model, if it does the same again on
    what it left.
    """
    double = copy.deepcopy(model).double()
    exact, expected = run(double), run(model)
    patch_peft()
    in_double = run(double)
    with Calls() as calls:
        actual = run(model)
    alone = collections.defaultdict(list)
    hook = functools.partial(solve_layer, alone)
    handles = [layer.register_forward_hook(hook) for layer in peft_layers(model)]
    run(model)
    for handle in handles:
        handle.remove()
    unpatch_peft()

    assert calls.fused == fused
    assert actual.keys() == expected.keys() == in_double.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        if fused == 0:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
        assert_close(in_double[name].float(), exact[name].double(), exact[name].float(), name)
    for (name, _), triples in alone.items():
        # A layer has few elements: judged together, no baseline is small by luck.
        assert_close(*(torch.cat(parts) for parts in zip(*triples, strict=True)), name)


def solve_layer(alone, layer, args, _):
    """A forward hook that solves the layer on this x and random gradients by itself.

    Appends (patched, in float64, PEFT's) of y and each gradient to alone[name, dtype], scaled to
    be near one.
    """
    with torch.inference_mode(False), torch.no_grad():
        x = args[0].clone()
        exact_layer = copy.deepcopy(layer).double()
        dy = torch.randn_like(UPSTREAM(layer, x))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def solve(forward, layer, dtype):
        leaves = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        leaves["x"] = x.to(dtype).requires_grad_()
        y = forward(layer, leaves["x"])
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
        given = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
        return {"y": y.detach(), **given}

    exact = solve(UPSTREAM, exact_layer, torch.float64)
    expected = solve(UPSTREAM, layer, x.dtype)
    actual = solve(PeftLinear.forward, layer, x.dtype)
    assert actual.keys() == expected.keys() == exact.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        size = exact[name].square().mean().sqrt().item()
        scale = 2.0 ** -round(math.log2(size)) if size > 0 else 1.0  # a power: without rounding
        triple = [solved[name].flatten() * scale for solved in (actual, exact, expected)]
        alone[name, actual[name].dtype].append(triple)


def peft_layers(model):
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


# ---- the patch itself ----


def test_patches_once_and_reverses():
    patch_peft()
    once = PeftLinear.forward
    patch_peft()
    assert PeftLinear.forward is once
    assert once is not UPSTREAM
    assert once.__wrapped__ is UPSTREAM
    assert (once.__name__, once.__qualname__) == ("forward", "Linear.forward")
    assert inspect.signature(once) == inspect.signature(UPSTREAM)
    unpatch_peft()
    assert PeftLinear.forward is UPSTREAM
    unpatch_peft()
    assert PeftLinear.forward is UPSTREAM


def test_does_not_take_away_the_patch_of_another(monkeypatch):
    patch_peft()
    own = PeftLinear.forward
    with monkeypatch.context() as patch:
        patch.setattr(PeftLinear, "forward", lambda self, x: own(self, x))
        with pytest.raises(RuntimeError, match="replaced since patch_peft"):
            unpatch_peft()
    assert PeftLinear.forward is own


def test_knows_this_version_of_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_peft()


def test_warns_once_of_a_forward_it_does_not_know_and_patches_it(monkeypatch):
    def forward(self, x, *args, **kwargs):
        return UPSTREAM(self, x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PeftLinear, "forward", forward)
        with pytest.warns(RuntimeWarning, match="none that lora_kernels knows"):
            patch_peft()
        assert PeftLinear.forward.__wrapped__ is forward
        unpatch_peft()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch_peft()
        unpatch_peft()
        assert PeftLinear.forward is forward


def test_without_peft_there_is_an_import_error_and_nothing_else():
    code = """
import sys
sys.modules["peft"] = None
import lora_kernels
lora_kernels.unpatch_peft()
assert len(lora_kernels.report(lora_kernels.Linear(4, 4, r=1))) == 1
try:
    lora_kernels.patch_peft()
except ImportError as error:
    print(error.name.partition(".")[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["peft"], done.stderr


# ---- models ----


@both_models
def test_forward_and_backward(family, seed, device):
    assert_as_without(with_lora(family, device), step, fused=LAYERS[family])


@both_models
def test_state_dict(family, seed, device):
    plain = with_lora(family, device).state_dict()
    patch_peft()
    model = with_lora(family, device)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    assert list(model.state_dict()) == list(plain)


@both_models
def test_two_adapters_switched(family, seed, device):
    model = with_lora(family, device)
    model.add_adapter("other", config(family, r=2))
    randomise(model).to(device)

    def run(model):
        model.set_adapter("other")
        other = step(model)
        model.set_adapter("default")
        return {**{f"other {n}": t for n, t in other.items()}, **step(model)}

    assert_as_without(model, run, fused=2 * LAYERS[family])


def test_two_adapters_at_once_are_left_to_peft_where_they_meet(seed, device):
    model = with_lora("llama", device)
    model.add_adapter("other", config("llama", target_modules=["q_proj", "v_proj"]))
    randomise(model).to(device).base_model.set_adapter(["default", "other"])
    assert_as_without(model, step, fused=LAYERS["llama"] - 4)


@both_models
def test_disabled_adapters(family, seed, device):
    def run(model):
        with model.disable_adapter():
            return logits(model)

    assert_as_without(with_lora(family, device), run, fused=0)


@both_models
def test_merge_and_unmerge(family, seed, device):
    def run(model):
        model.merge_adapter()
        merged = logits(model)["logits"]
        model.unmerge_adapter()
        return {"merged": merged, **step(model)}

    assert_as_without(with_lora(family, device), run, fused=LAYERS[family])


@both_models
def test_merge_and_unload(family, seed, device):
    def run(model):
        plain = copy.deepcopy(model).merge_and_unload()
        assert not peft_layers(plain)
        return logits(plain)

    assert_as_without(with_lora(family, device), run, fused=0)


@both_models
def test_save_and_plain_reload(family, seed, device, tmp_path):
    model = with_lora(family, device)
    patch_peft()
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).to(device)
    expected = step(model)
    with Calls() as calls:
        actual = step(again)
    assert calls.fused == LAYERS[family]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_mixed_batches(seed, device):
    model = with_lora("llama", device)
    model.add_adapter("other", config("llama", r=2))
    randomise(model).to(device).eval()
    assert_as_without(
        model,
        lambda model: logits(model, adapter_names=["other", "__base__", "default", "other"]),
        fused=0,
    )


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(family, dtype, seed, device):
    def run(model):
        with torch.autocast(device.type, dtype):
            return step(model)

    assert_as_without(with_lora(family, device), run, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(family, use_reentrant, seed, device):
    def run(model):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return step(model)

    model = with_lora(family, device)
    model.train()
    assert_as_without(model, run, fused=2 * LAYERS[family])


@both_models
def test_modules_to_save(family, seed, device):
    model = with_lora(family, device, modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.modules_to_save.default.weight" in step(model)
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_model(family, copied, seed, device, patched):
    model = with_lora(family, device)
    expected = step(model)
    again = copied(model)
    with Calls() as calls:
        actual = step(again)
    assert calls.fused == LAYERS[family]
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@both_models
def test_dora(family, seed, device):
    # randomise() has perturbed the magnitudes too
    assert_as_without(with_lora(family, device, use_dora=True), step, fused=0)


def test_rslora_and_patterns(seed, device):
    options = {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 1, "down_proj": 6},
        "alpha_pattern": {"k_proj": 17},
    }
    model = with_lora("llama", device, **options)
    assert {lora.lora_A["default"].weight.shape[0] for lora in peft_layers(model)} == {1, 3, 6}
    assert_as_without(model, step, fused=LAYERS["llama"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trainable_biases(bias, seed, device):
    model = with_lora("gpt2", device, bias=bias)
    assert any(name.endswith("c_attn.base_layer.bias") for name in step(model))
    assert_as_without(model, step, fused=LAYERS["gpt2"])


def test_lora_bias(seed, device):
    assert_as_without(with_lora("gpt2", device, lora_bias=True), step, fused=0)


def test_scaling_is_read_in_every_call(seed, device):
    def run(model):
        for layer in peft_layers(model):
            layer.set_scale("default", 3)
            layer.scale_layer(0.5)
        return step(model)

    assert_as_without(with_lora("llama", device), run, fused=LAYERS["llama"])


def test_a_trainable_base(seed, device):
    def run(model):
        model.requires_grad_(True)
        return step(model)

    assert_as_without(with_lora("gpt2", device), run, fused=LAYERS["gpt2"])


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor(frozen, seed, device):
    model = with_lora("llama", device)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    assert_as_without(model, step, fused=LAYERS["llama"])


@both_models
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_base(family, autocast_adapter_dtype, seed, device):
    base = BASES[family]().bfloat16()
    lora = peft.get_peft_model(base, config(family), autocast_adapter_dtype=autocast_adapter_dtype)
    model = randomise(lora).to(device)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {layer.lora_A["default"].weight.dtype for layer in peft_layers(model)} == {expected}
    assert_as_without(model, step, fused=LAYERS[family])


def test_bfloat16_adapters_of_a_float32_base(seed, device):
    model = with_lora("llama", device)
    for layer in peft_layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    assert_as_without(model, step, fused=LAYERS["llama"])


def test_adapters_that_transformers_adds(seed, device):
    model = tiny_llama()
    model.add_adapter(config("llama"))
    assert_as_without(randomise(model).to(device), step, fused=LAYERS["llama"])


def test_generation(seed, device):
    model = with_lora("llama", device).eval()
    ids = torch.tensor([[3, 1, 4]], device=device)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    patch_peft()
    with Calls() as calls:
        actual = model.generate(input_ids=ids, **options)
    assert actual.tolist() == expected.tolist()
    assert calls.fused == 4 * LAYERS["llama"]


def test_user_hooks_on_lora_a_are_called(seed, device):
    model = with_lora("llama", device)
    seen = []
    for layer in peft_layers(model)[:2]:
        layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert_as_without(model, step, fused=LAYERS["llama"] - 2)
    seen.clear()
    patch_peft()
    step(model)
    assert seen == [(4, 7, 3)] * 2


class Quantised(nn.Linear):
    """What bitsandbytes' layers are like: a subclass whose weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def test_quantised_bases(seed, device):
    base = tiny_llama()
    for block in base.model.layers:
        block.mlp.up_proj.__class__ = Quantised
    assert_as_without(with_lora("llama", device, base=base), step, fused=LAYERS["llama"] - 2)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def test_hooks_that_accelerate_attached_before_the_patch(seed, device):
    model = with_lora("llama", device)
    for layer in peft_layers(model)[:3]:
        add_hook_to_module(layer, Doubling())  # keeps PEFT's own forward
    add_hook_to_module(peft_layers(model)[3].base_layer, Doubling())
    assert_as_without(model, step, fused=LAYERS["llama"] - 4)


def test_hooks_that_accelerate_attaches_after_the_patch(seed, device):
    model = with_lora("llama", device)
    hooked = copy.deepcopy(model)
    for layer in peft_layers(model):
        add_hook_to_module(layer, Doubling())
    expected = logits(model)
    exact = logits(model.double())
    patch_peft()
    for layer in peft_layers(hooked):
        add_hook_to_module(layer, Doubling())
    with Calls() as calls:
        actual = logits(hooked)
    assert calls.fused == LAYERS["llama"]
    assert all(row.fused for row in report(hooked))
    assert_close(actual["logits"], exact["logits"], expected["logits"])


# ---- dropout: the masks are others, what does not depend on them is the same ----


@both_models
def test_dropout_is_off_in_eval(family, seed, device):
    model = with_lora(family, device, lora_dropout=0.4).eval()
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(family, use_reentrant, seed, device, patched):
    def run():
        torch.manual_seed(seed)
        with Calls() as calls:
            return step(model), calls.fused

    model = with_lora(family, device, lora_dropout=0.4).train()
    model.enable_input_require_grads()
    expected, once = run()
    torch.manual_seed(seed + 1)
    assert not torch.equal(step(model)["loss"], expected["loss"])  # there are masks
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual, twice = run()
    assert (once, twice) == (LAYERS[family], 2 * LAYERS[family])
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_dropout_is_linear_and_its_backward_the_adjoint(conv1d, seed, device, patched):
    layer = lora_layer(device, conv1d=conv1d, bias=False, lora_dropout=0.5).double().train()

    def run(x):
        torch.manual_seed(seed)
        with Calls() as calls:
            y = layer(x)
        assert calls.fused == 1
        return y

    u, v = torch.randn(2, 5, 16, dtype=torch.float64, device=device)
    tolerance = {"rtol": 0, "atol": 1e-12}  # of sums of 16 products near one in float64
    torch.testing.assert_close(run(2 * u - v), 2 * run(u) - run(v), **tolerance)
    x = u.requires_grad_()
    y = run(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close((dy * y).sum(), (dx * x).sum(), **tolerance)
    assert not torch.equal(y, layer.eval()(x))


# ---- one layer: what the guard takes, and what it leaves to PEFT ----


class Net(nn.Module):
    """One layer [.., 16] -> [.., 12]."""

    def __init__(self, conv1d, bias):
        super().__init__()
        self.layer = Conv1D(12, 16) if conv1d else nn.Linear(16, 12, bias=bias)
        if conv1d and not bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)


def lora_layer(device, *, conv1d=False, bias=True, base=None, **options):
    net = Net(conv1d, bias) if base is None else base
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **options}
    model = peft.get_peft_model(net, peft.LoraConfig(fan_in_fan_out=conv1d, **options))
    layer = model.base_model.model.layer.to(device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return layer


def disable_casting(layer):
    layer.cast_input_dtype_enabled = False


def add_active(layer):
    layer.update_layer("other", 2, 2, peft.LoraConfig())
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
    "infinite scaling": (scaled_by(float("inf")), "scaling is inf"),
    "scaling per column": (scaled_by(torch.ones(12)), r"tensor of shape \[12\]"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_what_the_guard_does_not_know_runs_pefts_forward(change, reason, seed, device):
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
    assert (row.fused, row.plan) == (False, None)
    assert re.search(reason, row.reason), row.reason


def replace_forward(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight))


def test_a_replaced_forward_of_linear_is_called(monkeypatch, seed, device):
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
    "no tensor": (lambda layer: None, [1.0] * 16),
    "argument": (lambda layer: None, torch.randn(3, 16), {"surplus": 1}),
    "base dtype": (lambda layer: layer.base_layer.bfloat16(), torch.randn(3, 16)),
    "bias dtype": (
        lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(12).double())),
        torch.randn(3, 16),
    ),
    "B dtype": (lambda layer: layer.lora_B.bfloat16(), torch.randn(3, 16)),
    "A shape": (replace(A, lambda _: nn.Linear(15, 4, bias=False)), torch.randn(3, 16)),
    "B shape": (replace(B, lambda _: nn.Linear(3, 12, bias=False)), torch.randn(3, 16)),
}


@pytest.mark.parametrize("case", BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_peft_raises_is_raised(case, seed):
    change, x, kwargs = (*case, {})[:3]
    layer = lora_layer("cpu")
    change(layer)
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever it is, it is to stay
        layer(x, **kwargs)
    patch_peft()
    with pytest.raises(type(expected.value)) as actual:
        layer(x, **kwargs)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 0, 16), (2, 3, 2, 16)])
def test_shapes_of_x(shape, bias, conv1d, seed, device):
    layer = lora_layer(device, conv1d=conv1d, bias=bias)
    x = torch.randn(shape, device=device)

    def run(layer):
        leaf = x.to(layer.weight.dtype).requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *trained(layer)])
        return dict(zip(["y", "x", "a", "b"], [y.detach(), *grads], strict=True))

    def trained(layer):
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    assert_as_without(layer, run, fused=1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, seed, device):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device)

    def run(layer):
        with mode():
            return {"y": layer(x.to(layer.weight.dtype)).clone()}

    assert_as_without(layer, run, fused=1)


def test_meta_tensors(patched):
    layer = lora_layer("meta")
    y = layer(torch.empty(2, 3, 16, device="meta"))
    assert (y.shape, y.device.type, y.dtype) == ((2, 3, 12), "meta", torch.float32)


def test_the_output_may_be_changed_in_place(seed, device, patched):
    layer, x = lora_layer(device), torch.randn(3, 16, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    y = layer(x)
    (actual,) = torch.autograd.grad(torch.relu_(y).sum(), x)
    assert torch.equal(actual, expected)


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


# ---- torch.compile ----


def graphs(nodes):
    """A backend that runs what AOTAutograd makes, and notes the operators of the forward."""

    def compiler(module, example_inputs):
        nodes.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    return aot_autograd(
        fw_compiler=compiler, bw_compiler=lambda module, _: make_boxed_func(module.forward)
    )


@pytest.mark.parametrize(("family", "hotswap"), [("llama", False), ("gpt2", True)])
def test_compiles_whole(family, hotswap, seed, device):
    """With hotswap the scaling is a tensor, and no new value of it compiles anything again."""
    model = with_lora(family, device, base=BASES[family](layers=1)).double()
    layers = LAYERS[family] // 2
    if hotswap:
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        randomise(model)
        assert_as_without(model, step, fused=layers)
    torch._dynamo.reset()
    nodes = []

    def compare():
        expected = step(model)
        patch_peft()
        actual = step(compiled)
        unpatch_peft()
        for name, value in expected.items():
            value32 = actual[name if name in actual else f"_orig_mod.{name}"].float()
            assert_close(value32, value, value.float(), name)

    compiled = torch.compile(model, fullgraph=True, backend=graphs(nodes))
    compare()
    assert nodes.count(ops.lora_linear_forward) == layers
    if hotswap:
        for layer in peft_layers(model):
            layer.scaling["default"].fill_(0.25)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compare()
