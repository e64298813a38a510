"""patch_peft() over batches of several adapters (adapter_names): PEFT's numbers, in one call."""

import copy

import peft
import pytest
import torch

from lora_kernels import patch_peft
from lora_kernels.integrations.peft.guard import NotFused
from lora_kernels.integrations.peft.mixed import mixed_of
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.peft_models import UPSTREAM, both_bases, config, lora_layer, with_lora
from tests.tiny_models import BASES, LAYERS, TARGETS, randomise

pytestmark = pytest.mark.usefixtures("unpatched")

NAMES = {
    "sorted": ["default", "default", "other", "third", "third"],
    "shuffled": ["other", "default", "third", "default", "other"],
    "base": ["__base__", "default", "__base__", "other", "__base__"],
    "one": ["other"] * 5,
    "an adapter that the layer lacks": ["default", "nowhere", "other", "nowhere", "third"],
}
every_order = pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())


def layer_of_three(conv1d, device, dtype=torch.float64, **options):
    layer = lora_layer(device, conv1d=conv1d, **options)
    for name, r in (("other", 2), ("third", 7)):
        settings = peft.LoraConfig(r=r, lora_alpha=3, **options)
        layer.update_layer(name, r, lora_alpha=3, config=settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return layer.to(device, dtype)


def mixed(layer, x, names, calls=1):
    patch_peft()
    with Calls() as made:
        y = layer(x, adapter_names=names)
    assert made.names == ["lora_grouped_linear_forward"] * calls
    return y


@both_bases
@every_order
@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 16), (5, 2, 3, 16)], ids=str)
def test_outputs_and_gradients_are_pefts(conv1d, names, shape, seed, device):
    layer = layer_of_three(conv1d, device)
    leaves = {n: p.requires_grad_() for n, p in layer.named_parameters() if "lora_" in n}
    x = torch.randn(shape, dtype=torch.float64, device=device).requires_grad_()
    expected = UPSTREAM(layer, x, adapter_names=names)
    actual = mixed(layer, x, names)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(expected)
    operands = [x, *leaves.values()]
    theirs, ours = (
        torch.autograd.grad(y, operands, dy, allow_unused=True) for y in (expected, actual)
    )
    for name, mine, other in zip(["x", *leaves], ours, theirs, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@every_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_as_pefts(names, dtype, seed, device):
    layer = layer_of_three(False, device, dtype)
    x = torch.randn(5, 40, 16, device=device, dtype=dtype)
    exact = UPSTREAM(copy.deepcopy(layer).double(), x.double(), adapter_names=names)
    expected = UPSTREAM(layer, x, adapter_names=names)
    assert_close(mixed(layer, x, names).detach(), exact.detach(), expected.detach())


def test_the_result_can_be_changed_in_place(seed, device):
    layer = layer_of_three(False, device)
    x = torch.randn(5, 3, 16, dtype=torch.float64, device=device)
    mixed(layer, x, NAMES["sorted"]).relu_().sum().backward()


@pytest.mark.parametrize("family", list(BASES))
def test_a_whole_model_in_eval_mode(family, seed, device):
    model = with_lora(family, device)
    model.add_adapter("other", config(family, r=2))
    model.add_adapter("third", config(family, target_modules=TARGETS[family][:1]))
    randomise(model).to(device).double().eval()
    ids = torch.arange(35, device=device).view(5, 7) % 13
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=NAMES["shuffled"]).logits
        patch_peft()
        with Calls() as calls:
            actual = model(input_ids=ids, adapter_names=NAMES["shuffled"]).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert calls.names.count("lora_grouped_linear_forward") == LAYERS[family]


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(beams, seed, device):
    model = with_lora("llama", device)
    model.add_adapter("other", config("llama", r=2))
    randomise(model).to(device).eval()
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]], device=device)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    options |= {"eos_token_id": None, "adapter_names": ["other", "__base__"]}
    expected = model.generate(input_ids=ids, **options)
    patch_peft()
    with Calls() as calls:
        actual = model.generate(input_ids=ids, **options)
    assert actual.tolist() == expected.tolist()
    assert calls.names.count("lora_grouped_linear_forward") == 4 * LAYERS["llama"]


def hook(layer):
    layer.lora_A["other"].register_forward_hook(lambda *args: None)


def several_dtypes(layer):
    layer.lora_A["other"].float(), layer.lora_B["other"].float()


REASONS = {
    "hooks": (hook, "lora_A has hooks"),
    "several dtypes": (several_dtypes, "its adapters have several dtypes"),
    "disabled": (lambda layer: layer.enable_adapters(False), "its adapters are disabled"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS.keys())
def test_what_the_guard_does_not_know_runs_pefts_code(change, reason, seed, device):
    layer = layer_of_three(False, device)
    change(layer)
    x = torch.randn(5, 16, dtype=torch.float64, device=device)
    found = mixed_of(layer, x, NAMES["sorted"])
    assert found == NotFused(reason)
    expected = UPSTREAM(layer, x, adapter_names=NAMES["sorted"])
    patch_peft()
    assert torch.equal(layer(x, adapter_names=NAMES["sorted"]), expected)


@pytest.mark.parametrize("names", [["default"], [], ["default"] * 6])
def test_errors_are_pefts(names, seed, device):
    layer = layer_of_three(False, device)
    x = torch.randn(5, 16, dtype=torch.float64, device=device)
    patch_peft()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer(x, adapter_names=names)


def test_merged_adapters_are_pefts_error(seed, device):
    layer = layer_of_three(False, device)
    layer.merge(adapter_names=["default"])
    patch_peft()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        layer(torch.randn(5, 16, dtype=torch.float64), adapter_names=NAMES["sorted"])
