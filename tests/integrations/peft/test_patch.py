"""patch_peft(): with the patch PEFT does what it does without it, and fused if it can be."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from functorch.compile import make_boxed_func
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import check_peft_version

from lora_kernels import patch_peft, report, unpatch_peft
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.peft_models import (
    UPSTREAM,
    assert_as_without,
    both_bases,
    config,
    logits,
    lora_layer,
    peft_layers,
    step,
    with_lora,
)
from tests.tiny_models import BASES, LAYERS, TARGETS, randomise, tiny_llama

both_models = pytest.mark.parametrize("family", list(BASES))


pytestmark = pytest.mark.usefixtures("unpatched")


# ---- the patch itself ----


def test_patch_is_made_once_and_reversed():
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


def test_unpatch_does_not_take_away_the_patch_of_another(monkeypatch):
    patch_peft()
    own = PeftLinear.forward
    with monkeypatch.context() as patch:
        patch.setattr(PeftLinear, "forward", lambda self, x: own(self, x))
        with pytest.raises(RuntimeError, match="replaced since patch_peft"):
            unpatch_peft()
    assert PeftLinear.forward is own


def test_patch_knows_this_version_of_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_peft()


def test_patch_warns_once_of_a_forward_that_it_does_not_know_and_replaces_it(monkeypatch):
    def forward(self, x, *args, **kwargs):
        return UPSTREAM(self, x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PeftLinear, "forward", forward)
        with pytest.warns(RuntimeWarning, match="lora_kernels does not know"):
            patch_peft()
        assert PeftLinear.forward.__wrapped__ is forward
        unpatch_peft()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch_peft()
        unpatch_peft()
        assert PeftLinear.forward is forward


def test_patch_without_peft_is_an_import_error_and_nothing_else():
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
def test_adapters_switched(family, seed, device):
    model = with_lora(family, device)
    model.add_adapter("other", config(family, r=2))
    randomise(model).to(device)

    def run(model):
        model.set_adapter("other")
        other = step(model)
        model.set_adapter("default")
        return {**{f"other {n}": t for n, t in other.items()}, **step(model)}

    assert_as_without(model, run, fused=2 * LAYERS[family])


@both_models
def test_adapters_at_once(family, seed, device):
    model = with_lora(family, device)
    model.add_adapter("other", config(family, target_modules=TARGETS[family][:1]))  # once a block
    randomise(model).to(device).base_model.set_adapter(["default", "other"])
    assert_as_without(model, step, fused=LAYERS[family])


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


@both_models
def test_mixed_batches(family, seed, device):
    model = with_lora(family, device)
    model.add_adapter("other", config(family, r=2))
    randomise(model).to(device).eval()
    assert_as_without(
        model,
        lambda model: logits(model, adapter_names=["other", "__base__", "default", "other"]),
        fused=LAYERS[family],
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
    assert_as_without(with_lora(family, device, use_dora=True), step, fused=LAYERS[family])


@both_models
def test_rslora_and_patterns(family, seed, device):
    first, second, last = TARGETS[family][0], TARGETS[family][1], TARGETS[family][-1]
    options = {
        "use_rslora": True,
        "rank_pattern": {first: 1, last: 6},
        "alpha_pattern": {second: 17},
    }
    model = with_lora(family, device, **options)
    assert {lora.lora_A["default"].weight.shape[0] for lora in peft_layers(model)} == {1, 3, 6}
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trainable_biases(family, bias, seed, device):
    base = tiny_llama(attention_bias=True) if family == "llama" else None
    model = with_lora(family, device, base=base, bias=bias)
    first = TARGETS[family][0]
    assert any(name.endswith(f"{first}.base_layer.bias") for name in step(model))
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
def test_lora_bias(family, seed, device):
    assert_as_without(with_lora(family, device, lora_bias=True), step, fused=LAYERS[family])


@both_models
def test_scaling_is_read_in_every_call(family, seed, device):
    def run(model):
        for layer in peft_layers(model):
            layer.set_scale("default", 3)
            layer.scale_layer(0.5)
        return step(model)

    assert_as_without(with_lora(family, device), run, fused=LAYERS[family])


@both_models
def test_trainable_base(family, seed, device):
    def run(model):
        model.requires_grad_(True)
        return step(model)

    assert_as_without(with_lora(family, device), run, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_factor(family, frozen, seed, device):
    model = with_lora(family, device)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16_base(family, autocast_adapter_dtype, seed, device):
    base = BASES[family]().bfloat16()
    lora = peft.get_peft_model(base, config(family), autocast_adapter_dtype=autocast_adapter_dtype)
    model = randomise(lora).to(device)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {layer.lora_A["default"].weight.dtype for layer in peft_layers(model)} == {expected}
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
def test_bfloat16_adapters_of_a_float32_base(family, seed, device):
    model = with_lora(family, device)
    for layer in peft_layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    assert_as_without(model, step, fused=LAYERS[family])


@both_models
def test_adapters_that_transformers_adds(family, seed, device):
    model = BASES[family]()
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    model.add_adapter(config(family))
    assert_as_without(randomise(model).to(device), step, fused=LAYERS[family])


@both_models
def test_generation(family, seed, device):
    model = with_lora(family, device).eval()
    ids = torch.tensor([[3, 1, 4]], device=device)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    patch_peft()
    with Calls() as calls:
        actual = model.generate(input_ids=ids, **options)
    assert actual.tolist() == expected.tolist()
    assert calls.fused == 4 * LAYERS[family]


@both_models
def test_hooks_of_a_user_on_lora_a_are_called(family, seed, device):
    model = with_lora(family, device)
    seen = []
    for layer in peft_layers(model)[:2]:
        layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(args[2].shape))
    assert_as_without(model, step, fused=LAYERS[family] - 2)
    seen.clear()
    patch_peft()
    step(model)
    assert seen == [(4, 7, 3)] * 2


class QuantisedLinear(nn.Linear):
    """What bitsandbytes' layers are like: a subclass whose weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


class QuantisedConv1D(Conv1D):
    def forward(self, x):
        return x @ self.weight.round(decimals=1) + self.bias


@both_models
def test_quantised_bases(family, seed, device):
    base = BASES[family]()
    for name, module in base.named_modules():
        if name.endswith(("up_proj", "c_fc")):  # once a block
            module.__class__ = QuantisedLinear if family == "llama" else QuantisedConv1D
    assert_as_without(with_lora(family, device, base=base), step, fused=LAYERS[family] - 2)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


@both_models
def test_hooks_that_accelerate_attached_before_the_patch(family, seed, device):
    model = with_lora(family, device)
    for layer in peft_layers(model)[:3]:
        add_hook_to_module(layer, Doubling())  # keeps PEFT's own forward
    add_hook_to_module(peft_layers(model)[3].base_layer, Doubling())
    assert_as_without(model, step, fused=LAYERS[family] - 4)


@both_models
def test_hooks_that_accelerate_attaches_after_the_patch(family, seed, device):
    def hooked(model):
        """A copy with hooks, which keep the forward that they find: PEFT's or the patch's."""
        model = copy.deepcopy(model)
        for layer in peft_layers(model):
            add_hook_to_module(layer, Doubling())
        return model

    model = with_lora(family, device)
    assert_as_without(model, lambda model: logits(hooked(model)), fused=LAYERS[family])
    patch_peft()
    assert all(row.fused for row in report(hooked(model)))


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


@both_bases
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


# ---- torch.compile ----


def graphs(nodes):
    """A backend that runs what AOTAutograd makes, and notes the operators of the forward."""

    def compiler(module, example_inputs):
        nodes.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    return aot_autograd(
        fw_compiler=compiler, bw_compiler=lambda module, _: make_boxed_func(module.forward)
    )


@both_models
@pytest.mark.parametrize("hotswap", [False, True])
def test_compiles_whole(family, hotswap, seed, device):
    """With hotswap the scaling is a tensor, and a new value of it compiles nothing again."""
    model = with_lora(family, device, base=BASES[family](layers=1))
    layers = LAYERS[family] // 2
    if hotswap:
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        randomise(model)
        assert_as_without(model, step, fused=layers)
    model.double()
    torch._dynamo.reset()
    nodes, run = [], step if hotswap else logits

    def compare():
        expected = run(model)
        patch_peft()
        actual = run(compiled)
        unpatch_peft()
        for name, value in expected.items():
            value32 = actual[name if name in actual else f"_orig_mod.{name}"].float()
            assert_close(value32, value, value.float(), name)

    compiled = torch.compile(model, fullgraph=True, backend=graphs(nodes))
    compare()
    assert nodes.count(torch.ops.lora_kernels.lora_linear_forward.default) == layers
    if hotswap:
        for layer in peft_layers(model):
            layer.scaling["default"].fill_(0.25)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compare()
