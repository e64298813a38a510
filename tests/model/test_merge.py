"""merge_lora and unmerge_lora: a whole model for deployment, and back."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lora_kernels as lora
from lora_kernels import apply_lora, merge_lora, merged_state_dict, unmerge_lora
from tests.model.nets import Net
from tests.model.wrapped import compiled


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, lora.LoRALayer)]


def adapted(**options):
    model = apply_lora(Net(), r=2, lora_alpha=4, **options)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


def held(model):
    return {name: (value, value.clone()) for name, value in model.state_dict().items()}


def assert_untouched(before, model):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert torch.equal(tensor, values), name
        assert tensor.data_ptr() == after[name].data_ptr(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("merge_weights", [True, False])
def test_merge_lora_merges_every_layer_and_unmerge_lora_takes_it_back(
    merge_weights, training, seed
):
    model = adapted(merge_weights=merge_weights).train(training)
    before = held(model)
    for _ in range(2):
        assert merge_lora(model) is model
        assert not any(module.training for module in model.modules())
        for layer in layers_of(model):
            assert layer.merged
            assert torch.equal(layer.complete_weight(), layer.merged_weight())
        assert_untouched(before, model)
    for _ in range(2):
        assert unmerge_lora(model) is model
        assert not any(layer.merged for layer in layers_of(model.eval()))
        assert_untouched(before, model)


def test_merge_lora_gives_the_outputs_of_merged_state_dict(seed):
    model = apply_lora(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), r=2, lora_alpha=4
    )
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plain.load_state_dict(merged_state_dict(model))
    x = torch.randn(5, 6)
    unmerged = model.eval()(x)
    assert torch.equal(merge_lora(model)(x), plain(x))
    assert torch.equal(merge_lora(copy.deepcopy(compiled(model)))(x), plain(x))
    assert torch.equal(unmerge_lora(model)(x), unmerged)


def test_merge_lora_keeps_what_is_merged_already(seed):
    model = merge_lora(adapted())
    weights = [layer.complete_weight() for layer in layers_of(model)]
    merge_lora(model.eval())
    again = [layer.complete_weight() for layer in layers_of(model)]
    assert all(old is new for old, new in zip(weights, again, strict=True))


def test_merge_lora_lasts_through_train_and_eval(seed):
    model = merge_lora(adapted())
    assert not any(layer.merged for layer in layers_of(model.train()))
    assert all(layer.merged for layer in layers_of(model.eval()))


def test_merge_lora_names_layers_that_compute_on_the_fly(seed):
    class Own(lora.LoRALinear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"own": Own(4, 4, r=2), "far": lora.LoRALinear(4, 4, r=2, device="meta")})
    with pytest.warns(UserWarning, match=r"own \(its forward is not.*far \(it is on the meta"):
        merge_lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(nn.Sequential(lora.LoRALinear(4, 4, r=2), lora.LoRALinear(4, 4)))


@pytest.mark.parametrize("function", [merge_lora, unmerge_lora])
def test_merge_lora_and_unmerge_lora_of_a_model_without_lora_say_so(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: Linear has no LoRA layer"):
        function(nn.Linear(4, 4))
