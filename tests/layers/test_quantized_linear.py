"""LoRAQuantizedLinear: an update beside a quantised layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRALinear, LoRAQuantizedLinear, frozen_weight
from tests.quantized import INEXACT, KINDS, quantised

N, K = 64, 128
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, **options):
    layer = LoRAQuantizedLinear(quantised(kind, N, K), 4, 8, **options)
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def dense_twin(layer):
    """The same over a plain nn.Linear."""
    plain = nn.Linear(K, N)
    with torch.no_grad():
        plain.weight.copy_(frozen_weight(layer.base_layer).dense(torch.float32))
        plain.bias.copy_(layer.bias)
    twin = LoRALinear.from_linear(
        plain, 4, 8, layer.lora_dropout.p, merge_weights=False, use_dora=layer.use_dora
    )
    for name in layer.factor_names:
        getattr(twin, name).data = getattr(layer, name).data.clone()
    return twin


@every_kind
def test_starts_as_the_layer_that_it_wraps(kind, seed):
    base, x = quantised(kind, N, K), torch.randn(5, K)
    expected = base(x)
    layer = LoRAQuantizedLinear(base, 4)
    assert layer.base_layer is base
    assert torch.equal(layer(x), expected)
    assert not any(p.requires_grad for p in base.parameters())
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@every_kind
def test_is_lora_over_the_dense_weight(kind, dropout, use_dora, seed):
    layer = adapted(kind, lora_dropout=dropout, use_dora=use_dora)
    twin = dense_twin(layer)
    x, dy = torch.randn(2, 5, K), torch.randn(2, 5, N)
    results = []
    for module in (layer, twin):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = module(leaf)
        wanted = [leaf, *(getattr(module, name) for name in module.factor_names)]
        results.append((y.detach(), *torch.autograd.grad(y, wanted, dy)))
    (y, *grads), (expected, *expected_grads) = results
    coarse = 0.02 if kind in INEXACT else 2e-3 if kind.startswith("hqq") else 1e-5
    assert (y - expected).norm() <= coarse * expected.norm()
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad - other).norm() <= (2e-3 if kind.startswith("hqq") else 1e-5) * other.norm()


@every_kind
def test_eval_never_merges(kind, seed):
    layer, x = adapted(kind, merge_weights=True), torch.randn(5, K)
    before = layer(x)
    layer.eval()
    assert not layer.merged
    assert (layer(x) - before).norm() <= 0.02 * before.norm()
    with pytest.warns(UserWarning, match="its weight is quantised"):
        lora_kernels.merge_lora(nn.Sequential(layer))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_merged_weight_is_dense(use_dora, seed):
    layer = adapted("nf4-nested", use_dora=use_dora)
    merged = layer.merged_weight()
    expected = frozen_weight(layer.base_layer).dense(torch.float32) + layer.delta_weight()
    torch.testing.assert_close(merged, expected)
    assert type(merged) is torch.Tensor
    assert not merged.requires_grad


def test_copies_and_pickles(seed):
    layer, x = adapted("nf4"), torch.randn(5, K)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_state_dict_has_the_bases_entries_and_the_factors(seed):
    layer = adapted("nf4-nested")
    state, base = layer.state_dict(), layer.base_layer.state_dict()
    assert state.keys() == {f"base_layer.{key}" for key in base} | {"lora_A", "lora_B"}


def packed(layer):
    """layer after a forward in eval() on a CPU with AVX512-BF16, on which bitsandbytes packs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as pack

    weight = layer.base_layer.weight
    weight.data, _ = pack(weight.data, weight.quant_state)
    return layer


@pytest.mark.parametrize("save", [nn.Module.state_dict, lambda layer: layer.to("cpu")])
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_may_be_saved_or_moved_after_an_evaluation(kind, save, seed):
    """bitsandbytes takes the weight out of its packed form then, with other scales."""
    layer, x = packed(adapted(kind)), torch.randn(5, K)
    expected = layer.frozen_weight.dense(torch.float32)
    save(layer)
    assert torch.equal(layer.frozen_weight.dense(torch.float32), expected)
    assert torch.allclose(layer(x), dense_twin(layer)(x), atol=1e-5)


def test_refuses_what_has_no_frozen_weight():
    with pytest.raises(TypeError, match="Linear has no frozen weight: its weight is dense"):
        LoRAQuantizedLinear(nn.Linear(4, 4), 2)
    with pytest.raises(ValueError, match="LoRAQuantizedLinear: r must be an integer >= 1, got 0"):
        LoRAQuantizedLinear(quantised("torchao-int8"), 0)
    trained = quantised("torchao-float8")
    trained.weight.requires_grad_()
    with pytest.raises(ValueError, match="requires grad"):
        LoRAQuantizedLinear(trained, 2)
    with pytest.raises(TypeError, match=r"Linear4bit is quantised: use LoRAQuantizedLinear"):
        LoRALinear.from_linear(quantised("nf4"), 2)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_hooks_of_the_base_run_without_a_magnitude_and_the_report_knows(use_dora, seed):
    layer, seen = adapted("nf4-nested", use_dora=use_dora), []
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    layer(torch.randn(5, K)).sum().backward()
    assert seen == ([] if use_dora else ["base"])
    (row,) = lora_kernels.report(layer)
    assert row.fused is use_dora
    assert "hooks" not in row.reason if use_dora else row.reason == "base_layer has hooks"
