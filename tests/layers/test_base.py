"""What every LoRA layer shares: merging, restoring, state dicts, copies. One test, every layer."""

import copy
import io
import os
import pathlib
import pickle
import subprocess
import sys

import loralib
import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRALayer, LoRALinear, LoRAMergedLinear
from tests.layers.test_linear import filled

LAYERS = {
    "linear": lambda **kw: LoRALinear(12, 20, r=3, lora_alpha=6, **kw),
    "fan_in_fan_out": lambda **kw: LoRALinear(12, 20, r=3, fan_in_fan_out=True, **kw),
    "merged_linear": lambda **kw: LoRAMergedLinear(12, 24, r=2, enable_lora=[True, False], **kw),
    "unequal groups": lambda **kw: LoRAMergedLinear(
        12, 24, r=2, enable_lora=[True, False, True], out_splits=(16, 4, 4), **kw
    ),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def build(make, device, **options):
    """The layer with a random update."""
    layer = filled(make(**options), device)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape))
    return layer


def example(layer, device):
    """An input that the layer takes."""
    return torch.randn(5, 12, device=device).to(layer.weight.dtype)


def unmerged_output(layer, x):
    """What the layer gives in eval mode when it adds the delta on the fly."""
    twin = copy.deepcopy(layer).train()
    twin.merge_weights = False
    return twin.eval()(x)


@every_layer
def test_merged_and_unmerged_outputs_agree(make, seed, device):
    layer = build(make, device, dtype=torch.float64).eval()
    assert layer.merged
    x = example(layer, device)
    torch.testing.assert_close(layer(x), unmerged_output(layer, x), rtol=1e-12, atol=1e-12)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_11_the_base_is_restored_bit_for_bit_after_a_thousand_cycles(make, dtype, seed, device):
    layer = build(make, device, dtype=dtype)
    base = layer.weight.detach().clone()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert torch.equal(layer.weight, base)


def test_11_loralib_drifts(seed):
    layer = filled(loralib.Linear(12, 20, r=3, dtype=torch.bfloat16), "cpu")
    base = layer.weight.detach().clone()
    for _ in range(1000):
        layer.eval()
        layer.train()
    assert not torch.equal(layer.weight, base)


@every_layer
def test_11_the_delta_is_rounded_once_and_the_copy_of_the_base_is_in_host_memory(
    make, seed, device
):
    layer = build(make, device, dtype=torch.bfloat16)
    exact = layer.base_weight().float() + layer.delta_weight()
    assert layer.delta_weight().dtype == torch.float32
    layer.eval()
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    assert layer.base_weight().device.type == "cpu"


@every_layer
def test_09_a_state_dict_is_unmerged_and_goes_round_in_eval(make, seed, device):
    layer = build(make, device)
    unmerged = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    x = example(layer, device)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved.keys() == unmerged.keys()
    for key, value in saved.items():
        assert torch.equal(value, unmerged[key]), key
    for mode in (True, False):
        fresh = build(make, device).train(mode)
        fresh.load_state_dict(saved)
        assert torch.equal(fresh.eval()(x), layer(x))


def test_09_loralib_merges_twice(seed):
    layer = filled(loralib.Linear(12, 20, r=3), "cpu")
    x = torch.randn(5, 12)
    layer.eval()
    expected = layer(x)
    fresh = loralib.Linear(12, 20, r=3)
    fresh.load_state_dict(layer.state_dict())
    fresh.eval()
    assert (fresh(x) - expected).abs().max() > 0.1


@every_layer
def test_10_loading_while_merged_takes_effect_at_once_and_leaves_the_base_exact(make, seed, device):
    layer, other = build(make, device).eval(), build(make, device)
    layer.load_state_dict(other.state_dict())
    x = example(layer, device)
    assert torch.equal(layer(x), other.eval()(x))
    layer.train()
    assert torch.equal(layer.weight, other.state_dict()[layer._weight_name])


@every_layer
def test_10_loading_the_adapter_alone_while_merged(make, seed, device):
    layer, other = build(make, device).eval(), build(make, device)
    base = layer.base_weight().clone()
    adapter = {key: value for key, value in other.state_dict().items() if "lora_" in key}
    layer.load_state_dict(adapter, strict=False)
    x = example(layer, device)
    torch.testing.assert_close(layer(x), unmerged_output(layer, x))
    assert torch.equal(layer.train().weight, base)


@every_layer
def test_10_loading_into_a_model_of_merged_layers(make, seed, device):
    model = nn.Sequential(nn.Identity(), build(make, device)).eval()
    other = nn.Sequential(nn.Identity(), build(make, device))
    model.load_state_dict(other.state_dict())
    x = example(model[1], device)
    assert torch.equal(model(x), other.eval()(x))


@every_layer
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "scaling"])
def test_10_edits_while_merged_take_effect_at_the_next_forward(make, name, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    x = example(layer, device)
    before = layer(x)
    if name == "scaling":
        layer.scaling *= 3
    else:
        with torch.no_grad():
            getattr(layer, name).mul_(3)
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, unmerged_output(layer, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.train().weight, base)


@every_layer
def test_10_a_failed_load_leaves_a_merged_layer_working(make, seed, device):
    layer = build(make, device).eval()
    x = example(layer, device)
    expected = layer(x)
    bad = {**layer.state_dict(), "lora_A": torch.zeros(1, 1)}
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(bad)
    assert torch.equal(layer(x), expected)


@every_layer
def test_13_a_tied_weight_is_not_merged_and_both_layers_are_right(make, seed, device):
    layer = build(make, device)
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    base = layer.weight.detach().clone()
    x = example(layer, device)
    expected = unmerged_output(layer, x)
    layer.eval()
    assert not layer.merged
    assert torch.equal(other.weight, base)
    assert torch.equal(layer(x), expected)
    del other
    layer.eval()  # nobody shares it any more
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


@every_layer
@pytest.mark.parametrize("view", ["part", "reshaped", "data"])
def test_13_a_weight_that_shares_memory_is_not_merged(make, view, seed, device):
    layer = build(make, device)
    weight = layer.weight.detach()
    shared = {
        "part": lambda: weight[:1],
        "reshaped": lambda: weight.view(-1),
        "data": lambda: weight,
    }
    holder = nn.ParameterList([nn.Parameter(shared[view]())])
    layer.eval()
    assert not layer.merged
    assert holder[0].data_ptr() == layer.weight.data_ptr()


@every_layer
def test_13_ties_that_come_and_go_are_seen_anew(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    layer.eval()
    layer.train()
    del optimizer
    base = layer.weight.detach().clone()
    other = nn.Linear(1, 1)
    other.weight = layer.weight
    assert not layer.eval().merged
    del other
    assert layer.eval().merged
    other = nn.Linear(1, 1)
    other.weight = layer.weight  # tied while merged: the next eval() gives it the base
    assert not layer.eval().merged
    assert torch.equal(other.weight, base)


@every_layer
def test_13_a_buffer_that_shares_memory_counts(make, seed, device):
    layer = build(make, device)
    holder = nn.Module()
    holder.register_buffer("table", layer.weight.detach())
    assert not layer.eval().merged
    assert holder.table.data_ptr() == layer.weight.data_ptr()


@every_layer
def test_13_other_references_to_the_parameter_do_not_stop_merging(make, seed, device):
    layer = build(make, device)
    optimizer = torch.optim.SGD(list(layer.parameters()), lr=0.1)
    assert layer.eval().merged
    assert optimizer.param_groups[0]["params"]


@every_layer
def test_14_merged_eval_gives_the_adapter_no_gradient_and_merge_weights_false_does(
    make, seed, device
):
    layer = build(make, device).eval()
    x = example(layer, device).requires_grad_()
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is None
    assert x.grad is not None
    layer = build(make, device, merge_weights=False).eval()
    layer(x).sum().backward()
    assert not layer.merged
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_08_copies_and_pickles_in_both_modes(make, training, seed, device):
    layer = build(make, device).train(training)
    x = example(layer, device)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.train().weight, layer.base_weight())
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))


def test_08_loralib_with_dropout_off_does_not_pickle():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(loralib.Linear(4, 4, r=2))


def test_08_goes_to_a_data_loader_worker(tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(
        "import torch\n"
        "from lora_kernels import LoRALinear\n"
        "class Collate:\n"
        "    def __init__(self):\n"
        "        self.layer = LoRALinear(4, 2, r=1, lora_dropout=0.1)\n"
        "    def __call__(self, rows):\n"
        "        return self.layer(torch.stack(rows)).detach()\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(list(torch.eye(4)), batch_size=2,\n"
        "        num_workers=1, multiprocessing_context='spawn', collate_fn=Collate())\n"
        "    print([tuple(batch.shape) for batch in loader])\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(lora_kernels.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.strip() == "[(2, 2), (2, 2)]", done.stderr


@every_layer
def test_casting_while_merged_casts_the_base_and_merges_again(make, seed, device):
    layer = build(make, device).eval()
    base = layer.base_weight().clone()
    layer.to(torch.bfloat16)
    assert layer.merged
    cast = copy.deepcopy(layer).train()
    assert torch.equal(cast.weight, base.to(torch.bfloat16))
    assert torch.equal(layer.weight, cast.merged_weight())


@every_layer
def test_meta_to_empty_and_reset(make, seed, device):
    layer = make(device="meta")
    layer.eval()
    layer.train()
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.delta_weight().abs().max() == 0


@every_layer
def test_eval_twice_train_twice(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    merged = layer.merged_weight()
    for _ in range(2):
        assert torch.equal(layer.eval().weight, merged)
    for _ in range(2):
        assert torch.equal(layer.train().weight, base)


@every_layer
def test_merges_inside_inference_mode(make, seed, device):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    with torch.inference_mode():
        layer.eval()
        layer(example(layer, device))
    assert torch.equal(layer.train().weight, base)
    assert layer.weight.requires_grad is False


@every_layer
@pytest.mark.parametrize("mode", [True, False])
def test_turning_merge_weights_off_while_merged_restores_at_the_next_switch(
    make, mode, seed, device
):
    layer = build(make, device)
    base = layer.weight.detach().clone()
    layer.eval()
    layer.merge_weights = False
    layer.train(mode)
    assert not layer.merged
    assert torch.equal(layer.weight, base)


@every_layer
def test_the_weight_object_stays_the_same_through_merging(make, seed, device):
    layer = build(make, device)
    weight, address = layer.weight, layer.weight.data_ptr()
    layer.eval()
    assert layer.weight is weight
    layer.train()
    assert layer.weight is weight
    assert weight.data_ptr() == address


def test_the_mixin_names_what_a_subclass_must_define():
    class Incomplete(LoRALayer, nn.Linear):
        def __init__(self):
            nn.Linear.__init__(self, 2, 2)
            LoRALayer.__init__(self, 1, 1, 0.0, True)

    with pytest.raises(NotImplementedError, match="Incomplete"):
        Incomplete().delta_weight()
