"""What every LoRA layer shares: state dicts, copies, the mixin. One test, every layer."""

import copy
import io
import itertools
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
from lora_kernels import (
    LoRAConv1d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMergedLinear,
)
from lora_kernels.checks import layer_name
from tests.layers.cases import build, every_layer, example, filled, unmerged_output


@every_layer
def test_state_dict_is_unmerged_and_goes_round_in_eval(make, seed, device):
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


def test_state_dict_of_loralib_is_merged_twice(seed):
    layer = filled(loralib.Linear(12, 20, r=3), "cpu")
    x = torch.randn(5, 12)
    layer.eval()
    expected = layer(x)
    fresh = loralib.Linear(12, 20, r=3)
    fresh.load_state_dict(layer.state_dict())
    fresh.eval()
    assert (fresh(x) - expected).abs().max() > 0.1


@every_layer
def test_load_while_merged_takes_effect_at_once_and_leaves_the_base_exact(make, seed, device):
    layer, other = build(make, device).eval(), build(make, device)
    layer.load_state_dict(other.state_dict())
    x = example(layer, device)
    assert torch.equal(layer(x), other.eval()(x))
    layer.train()
    assert torch.equal(layer.weight, other.state_dict()[layer.weight_name])


@every_layer
def test_load_of_the_adapter_alone_while_merged(make, seed, device):
    layer, other = build(make, device).eval(), build(make, device)
    base = layer.base_weight().clone()
    adapter = {key: value for key, value in other.state_dict().items() if "lora_" in key}
    layer.load_state_dict(adapter, strict=False)
    x = example(layer, device)
    torch.testing.assert_close(layer(x), unmerged_output(layer, x))
    assert torch.equal(layer.train().weight, base)


@every_layer
def test_load_into_a_model_of_merged_layers(make, seed, device):
    model = nn.Sequential(nn.Identity(), build(make, device)).eval()
    other = nn.Sequential(nn.Identity(), build(make, device))
    model.load_state_dict(other.state_dict())
    x = example(model[1], device)
    assert torch.equal(model(x), other.eval()(x))


@every_layer
def test_load_that_fails_leaves_a_merged_layer_working(make, seed, device):
    layer = build(make, device).eval()
    x = example(layer, device)
    expected = layer(x)
    bad = {**layer.state_dict(), "lora_A": torch.zeros(1, 1)}
    with pytest.raises(RuntimeError, match="lora_A"):
        layer.load_state_dict(bad)
    assert torch.equal(layer(x), expected)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles_in_both_modes(make, training, seed, device):
    layer = build(make, device).train(training)
    x = example(layer, device)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.train().weight, layer.base_weight())
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))


def test_pickle_of_loralib_with_dropout_off_fails():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(loralib.Linear(4, 4, r=2))


def test_pickle_goes_to_a_data_loader_worker(tmp_path):
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
def test_meta_to_empty_and_reset(make, seed, device):
    layer = make(device="meta")
    layer.eval()
    layer.train()
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.delta_weight().abs().max() == 0


def test_mixin_names_what_a_subclass_must_define():
    class Incomplete(LoRALayer, nn.Linear):
        def __init__(self):
            nn.Linear.__init__(self, 2, 2)
            LoRALayer.__init__(self, 1, 1, 0.0, True)

    with pytest.raises(NotImplementedError, match="Incomplete"):
        Incomplete().delta_weight()


# ---- errors ----

LAYERS = {
    "linear": lambda r: LoRALinear(12, 20, r=r),
    "fan_in_fan_out": lambda r: LoRALinear(12, 20, r=r, fan_in_fan_out=True),
    "dropout": lambda r: LoRALinear(12, 20, r=r, lora_dropout=0.5),
    "merged_linear": lambda r: LoRAMergedLinear(12, 20, r=r, enable_lora=[True, False]),
    "conv": lambda r: LoRAConv1d(12, 20, 3, r=r),
    "embedding": lambda r: LoRAEmbedding(12, 20, r=r),
}
LINEARS = ("linear", "fan_in_fan_out", "dropout", "merged_linear")
MISTAKES = {
    "type": lambda x: x.tolist(),
    "layout": lambda x: x.to_sparse(),
    "kind": lambda x: x.to(torch.complex64),
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "shape": lambda x: x[:, :5],
    "scalar": lambda x: x.flatten()[0],
}
IDS_OF_ANY_SHAPE = [("embedding", "shape"), ("embedding", "scalar")]
WEIGHTS = {
    "dtype": lambda weight: weight.to(torch.int8),
    "layout": lambda weight: weight.to_sparse(),
    "shape": lambda weight: weight[None],
}


def error_of(layer, x):
    """The class of the error that layer(x) raises, and its text behind the layer's name."""
    with pytest.raises((TypeError, ValueError)) as error:
        layer(x)
    name, _, problem = str(error.value).partition(": ")
    assert name == layer_name(layer)
    return error.type, problem


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [case for case in itertools.product(LAYERS, MISTAKES) if case not in IDS_OF_ANY_SHAPE],
)
def test_error_of_a_bad_x_is_the_same_in_both_modes_and_without_an_adapter(kind, mistake, device):
    x = {"conv": torch.ones(2, 12, 7), "embedding": torch.ones(2, 7, dtype=torch.int64)}.get(
        kind, torch.ones(2, 12)
    )
    x = MISTAKES[mistake](x.to(device))
    errors = [
        error_of(LAYERS[kind](r).to(device).train(training), x)
        for r in (2, 0)
        for training in (True, False)
    ]
    assert errors == errors[:1] * 4
    assert errors[0][1].startswith("x must")


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_error_of_a_bad_weight_is_the_same_in_both_modes_and_without_an_adapter(
    kind, change, device
):
    errors = []
    for r in (2, 0):
        for training in (True, False):
            layer = LAYERS[kind](r).to(device).train(training)
            layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
            errors.append(error_of(layer, torch.ones(2, 12, device=device)))
    assert errors == errors[:1] * 4
    assert errors[0][1].startswith("weight must")
