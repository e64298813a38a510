"""apply_lora and adapter files over quantised models."""

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRALinear, LoRAQuantizedLinear
from tests.quantized import KINDS, quantised

N = K = 128
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """A quantised layer between two dense ones."""

    def __init__(self, kind, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, K)
        self.lin = quantised(kind, N, K, bias=bias)
        self.head = nn.Linear(N, 4)

    def forward(self, x):
        return self.head(self.lin(self.first(x).relu()))


def drawn(model):
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@every_kind
def test_apply_train_save_and_load(kind, use_dora, tmp_path, seed):
    model, x = Net(kind), torch.randn(5, 16)
    expected = model(x)
    lora_kernels.apply_lora(
        model, r=2, lora_alpha=4, target_modules=["first", "lin"], use_dora=use_dora
    )
    assert type(model.lin) is LoRAQuantizedLinear
    assert type(model.first) is LoRALinear
    if use_dora:  # with the dense weight
        assert (model(x) - expected).norm() <= 0.03 * expected.norm()
    else:
        assert torch.equal(model(x), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = ["lora_A", "lora_B"] + ["lora_magnitude"] * use_dora
    assert trained == {f"{path}.{name}" for path in ("first", "lin") for name in names}
    drawn(model)
    model(x).sum().backward()
    assert model.first.lora_A.grad.abs().sum() > 0
    lora_kernels.save_adapter(model, tmp_path)
    fresh = lora_kernels.load_adapter(Net(kind), tmp_path)
    assert torch.equal(fresh(x), model(x))
    rows = {row.name: row for row in lora_kernels.report(model)}
    assert rows["lin"].fused
    assert "the layer's own product" in rows["lin"].reason
    model.lin.base_layer.register_forward_hook(lambda *_: None)
    row = {row.name: row for row in lora_kernels.report(model)}["lin"]
    if use_dora:  # the base is not called, so its hooks do not run
        assert row.fused
    else:
        assert (row.fused, row.reason) == (False, "base_layer has hooks")


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("bias", [True, False])
@every_kind
def test_merged_state_dict_is_dense(kind, bias, use_dora, seed):
    model, x = Net(kind, bias), torch.randn(5, 16)
    lora_kernels.apply_lora(model, r=2, lora_alpha=4, target_modules=["lin"], use_dora=use_dora)
    drawn(model)
    plain = nn.Sequential(nn.Linear(16, K), nn.ReLU(), nn.Linear(K, N, bias=bias), nn.Linear(N, 4))
    names = {"first": "0", "lin": "2", "head": "3"}
    state = {
        key.replace(path, names[path]): value.float()
        for key, value in lora_kernels.merged_state_dict(model).items()
        for path in [key.split(".")[0]]
    }
    plain.load_state_dict(state)
    expected = model(x)
    assert (plain(x) - expected).norm() <= 0.03 * expected.norm()


@every_kind
def test_all_linear_takes_quantised_layers(kind):
    model = lora_kernels.apply_lora(Net(kind), r=2, lora_alpha=4)
    kinds = [type(module) for module in (model.first, model.lin, model.head)]
    assert kinds == [LoRALinear, LoRAQuantizedLinear, LoRALinear]


def test_one_that_does_not_fit_is_refused_before_anything_changes(seed):
    bnb = pytest.importorskip("bitsandbytes")
    model = Net("nf4")
    model.lin = bnb.nn.Linear4bit(K, N)  # not on its device yet, so not quantised
    before = dict(model.named_modules())
    for targets in (["first", "lin"], "all-linear"):
        with pytest.raises(ValueError, match=r"lin \(Linear4bit\) cannot .* no quant_state"):
            lora_kernels.apply_lora(model, r=2, lora_alpha=4, target_modules=targets)
    assert dict(model.named_modules()) == before
    assert model.first.weight.requires_grad


def test_a_model_that_is_itself_quantised():
    with pytest.raises(ValueError, match=r"use LoRAQuantizedLinear\(model, r, ...\)"):
        lora_kernels.apply_lora(quantised("nf4"), r=2, lora_alpha=4)


def test_several_adapters_are_refused():
    with pytest.raises(ValueError, match=r"lin \(Linear4bit\) cannot get several adapters"):
        lora_kernels.apply_lora(
            Net("nf4"), adapters={"a": {"r": 2, "lora_alpha": 2}}, target_modules=["lin"]
        )


def test_biases_may_train(tmp_path, seed):
    model, x = Net("nf4"), torch.randn(5, 16)
    lora_kernels.apply_lora(model, r=2, lora_alpha=4, target_modules=["lin"], bias="lora_only")
    drawn(model)(x).sum().backward()
    assert model.lin.bias.grad is not None
    model.lin.bias.data += 1
    lora_kernels.save_adapter(model, tmp_path)
    fresh = lora_kernels.load_adapter(Net("nf4"), tmp_path)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "hqq-4"])
def test_what_is_quantised_cannot_train_as_a_whole(kind, tmp_path):
    dense = nn.Module()
    dense.first, dense.lin = nn.Linear(16, K), nn.Linear(K, N)
    lora_kernels.apply_lora(
        dense, r=2, lora_alpha=4, target_modules=["first"], modules_to_save=["lin"]
    )
    lora_kernels.save_adapter(dense, tmp_path)
    model = Net(kind)
    before = dict(model.named_modules())
    wanted = rf"(0.)?lin \({type(model.lin).__name__}\) is quantised, .*: leave it out"
    with pytest.raises(ValueError, match=f"modules_to_save: {wanted}"):
        lora_kernels.apply_lora(
            model, r=2, lora_alpha=4, target_modules=["first"], modules_to_save=["lin"]
        )
    with pytest.raises(ValueError, match=f"modules_to_save: {wanted}"):
        lora_kernels.mark_only_lora_as_trainable(nn.Sequential(model), modules_to_save=["0"])
    with pytest.raises(ValueError, match=f"adapter_config.json: modules_to_save: {wanted}"):
        lora_kernels.load_adapter(model, tmp_path)
    assert dict(model.named_modules()) == before
    assert model.first.weight.requires_grad
    lora_kernels.apply_lora(model, r=2, lora_alpha=4, target_modules=["first"])
    with pytest.raises(ValueError, match=f"modules_to_save: {wanted}"):
        lora_kernels.save_adapter(model, tmp_path, modules_to_save=["lin"])


@pytest.mark.parametrize("targets", [["first"], ["lin"]])
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_weights_that_an_evaluation_packed_are_kept(kind, targets, tmp_path, seed):
    """With LoRA and without. bitsandbytes packs on CPUs with AVX512-BF16, which is done by hand."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as pack

    def weight(model):
        layer = getattr(model.lin, "base_layer", model.lin)
        return lora_kernels.frozen_weight(layer).dense(torch.float32)

    def packed(model):
        held = getattr(model.lin, "base_layer", model.lin).weight
        held.data, _ = pack(held.data, held.quant_state)
        return model, weight(model)

    model = drawn(lora_kernels.apply_lora(Net(kind), r=2, lora_alpha=4, target_modules=targets))
    for save in (
        lambda: lora_kernels.save_adapter(model, tmp_path),
        lambda: lora_kernels.lora_state_dict(model),
        lambda: lora_kernels.merged_state_dict(model),
    ):
        _, expected = packed(model)
        save()
        assert torch.equal(weight(model), expected)
    fresh, expected = packed(Net(kind))
    lora_kernels.load_adapter(fresh, tmp_path)
    assert torch.equal(weight(fresh), expected)
    x = torch.randn(5, 16)
    torch.testing.assert_close(fresh(x), model(x))
