"""LoRALinear: loralib is the oracle, except where its faults are corrected."""

import copy
import pickle

import loralib
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune  # noqa: F401 - nn.utils gets both

import lora_kernels
from lora_kernels import LoRALayer, LoRALinear
from lora_kernels.spec import LoraSpec
from lora_kernels.testing.problem import lora_formula
from lora_kernels.testing.tolerance import assert_close
from tests.layers.cases import filled, output_and_gradients

CONFIGURATIONS = {
    "plain": {},
    "r": {"r": 3},
    "alpha": {"r": 4, "lora_alpha": 16},
    "fan_in_fan_out": {"r": 2, "fan_in_fan_out": True},
    "no bias": {"r": 5, "bias": False},
    "merge_weights off": {"r": 3, "merge_weights": False},
    "plain fan_in_fan_out": {"fan_in_fan_out": True},
}
configurations = pytest.mark.parametrize(
    "options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys()
)


def twins(options, device, dtype=torch.float32):
    """A layer here and one of loralib with the same parameters."""
    ours = filled(LoRALinear(12, 20, **options, dtype=dtype), device)
    theirs = loralib.Linear(12, 20, **options, dtype=dtype).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# ---- loralib's behaviour, kept ----


@configurations
def test_initial_values_are_loralibs_at_the_same_seed(options, seed):
    torch.manual_seed(seed)
    ours = LoRALinear(12, 20, **options)
    torch.manual_seed(seed)
    theirs = loralib.Linear(12, 20, **{**options, "fan_in_fan_out": False})
    expected = theirs.state_dict()
    if options.get("fan_in_fan_out"):  # stored transposed, from the same draws
        expected["weight"] = expected["weight"].T
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key


@configurations
def test_attributes_and_trainability_are_loralibs(options):
    ours, theirs = LoRALinear(12, 20, **options), loralib.Linear(12, 20, **options)
    for name in ("r", "lora_alpha", "merged", "merge_weights", "fan_in_fan_out", "scaling"):
        assert hasattr(ours, name) == hasattr(theirs, name), name
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    shapes = [
        {name: (p.shape, p.requires_grad) for name, p in layer.named_parameters()}
        for layer in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert isinstance(ours, nn.Linear)
    assert isinstance(ours, LoRALayer)
    assert lora_kernels.Linear is LoRALinear


@configurations
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_loralibs(options, training, seed, device):
    ours, theirs = (layer.train(training) or layer for layer in twins(options, device))
    exact = copy.deepcopy(ours).double()
    x = torch.randn(2, 7, 12, device=device)
    dy = torch.randn(2, 7, 20, device=device)
    results = [output_and_gradients(layer, x, dy) for layer in (ours, exact, theirs)]
    assert results[0].keys() == results[2].keys()
    for name, result in results[0].items():
        assert_close(result, results[1][name], results[2][name], name)


@configurations
def test_checkpoints_go_both_ways(options, seed, device):
    ours, theirs = twins(options, device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    back = LoRALinear(12, 20, **options).to(device)
    back.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 12, device=device)
    assert torch.equal(back(x), ours(x))


def test_positional_arguments_keep_loralibs_order():
    layer = LoRALinear(6, 8, 2, 4, 0.25, True, False)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout.p) == (2, 4, 0.25)
    assert layer.fan_in_fan_out
    assert not layer.merge_weights


def test_dropout_acts_in_training_alone_with_a_new_mask_in_every_call(seed, device):
    layer = filled(LoRALinear(64, 8, r=4, lora_dropout=0.5, merge_weights=False), device)
    x = torch.randn(16, 64, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    spec = LoraSpec(layer.scaling, 0.0, layer.output_splits)
    without = lora_formula(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, spec)
    torch.testing.assert_close(layer(x), without)


def test_dropout_has_the_output_without_it_as_its_mean(seed, device):
    layer = filled(LoRALinear(32, 4, r=4, lora_dropout=0.3, merge_weights=False), device)
    x = torch.randn(1, 32, device=device)
    with torch.no_grad():
        samples = torch.stack([layer(x) for _ in range(400)]).double()
        expected = layer.eval()(x).double()
    z = (samples.mean(0) - expected) / (samples.std(0) / 20)
    assert z.abs().max() <= 6


@pytest.mark.parametrize("r", [0, 2])
def test_eval_merges_and_train_restores(r, seed, device):
    layer = filled(LoRALinear(12, 20, r=r), device)
    base = layer.weight.detach().clone()
    layer.eval()
    assert layer.merged
    assert torch.equal(layer.complete_weight(), layer.merged_weight())
    assert torch.equal(layer.complete_weight(), base) == (r == 0)
    assert torch.equal(layer.weight, base)
    layer.train()
    assert not layer.merged
    assert torch.equal(layer.weight, base)


def test_merged_weight_is_base_plus_delta(seed, device):
    for fan_in_fan_out in (False, True):
        layer = filled(LoRALinear(12, 20, r=3, lora_alpha=6, fan_in_fan_out=fan_in_fan_out), device)
        delta = 2.0 * layer.lora_B.double() @ layer.lora_A.double()
        if fan_in_fan_out:
            delta = delta.T
        expected = layer.weight.double() + delta
        torch.testing.assert_close(layer.merged_weight().double(), expected)
        assert not layer.merged_weight().requires_grad


# ---- faults of loralib, corrected ----


def test_train_and_eval_return_self():
    layer = LoRALinear(4, 4, r=2)
    assert layer.train() is layer
    assert layer.eval() is layer
    assert loralib.Linear(4, 4, r=2).train() is None  # what is corrected


def test_pickles_and_deep_copies_with_dropout(seed, device):
    layer = filled(LoRALinear(6, 8, r=2, lora_dropout=0.1), device).eval()
    x = torch.randn(3, 6, device=device)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(copied(x), layer(x))
        copied.train()
        assert torch.equal(copied.weight, layer.state_dict()["weight"])
        assert layer.merged


def test_merging_under_autocast_is_exact(seed, device):
    plain, under = twins({"r": 2}, device)[0], None
    under = copy.deepcopy(plain)
    plain.eval()
    with torch.autocast(device.type, torch.bfloat16):
        under.eval()
    assert torch.equal(under.complete_weight(), plain.complete_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_on_a_16_bit_base(dtype, seed, device):
    layer = LoRALinear.from_linear(nn.Linear(16, 8, dtype=dtype), 4, lora_dtype=torch.float32)
    layer = filled(layer, device)
    x = torch.randn(5, 16, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    merged = layer.eval()(x)
    assert merged.dtype == dtype


def test_fan_in_fan_out_is_contiguous_and_drawn_with_the_right_fan(seed):
    layer = LoRALinear(400, 10, r=2, fan_in_fan_out=True)
    for _ in range(2):
        assert layer.weight.shape == (400, 10)
        assert layer.weight.is_contiguous()
        bound = 1 / 400**0.5  # kaiming_uniform with a = √5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        layer.reset_parameters()


# ---- wrapping ----


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_the_parameters_and_the_mode(bias, seed, device):
    linear = nn.Linear(6, 8, bias=bias).to(device).eval()
    x = torch.randn(3, 6, device=device)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=4, lora_dropout=0.1)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    assert torch.equal(layer(x), expected)
    assert layer.lora_A.abs().max() > 0
    assert (layer.r, layer.scaling, layer.lora_dropout.p) == (2, 2.0, 0.1)


def test_from_linear_takes_hugging_faces_conv1d(seed, device):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 6).to(device)
    layer = filled(LoRALinear.from_linear(conv1d, r=2), device)
    assert layer.fan_in_fan_out
    assert layer.weight is conv1d.weight
    x = torch.randn(3, 6, device=device)
    expected = conv1d(x) + (x @ layer.lora_A.T) @ layer.lora_B.T * layer.scaling
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_from_linear_on_the_meta_device_then_to_empty(seed, device):
    layer = LoRALinear.from_linear(nn.Linear(6, 8, device="meta"), r=2).to_empty(device=device)
    layer.reset_parameters()
    assert layer(torch.randn(3, 6, device=device)).isfinite().all()
    assert not layer.lora_B.any()


# ---- around it ----


@pytest.mark.parametrize("merged", [True, False])
def test_compiles_whole_and_exports(merged, seed, device):
    torch._dynamo.reset()
    layer = filled(LoRALinear(16, 8, r=4), device).train(not merged)
    x = torch.randn(5, 16, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))
    torch._dynamo.reset()


def test_trains_with_an_optimizer_as_the_composed_formula_does(seed, device):
    ours, theirs = twins({"r": 4}, device, torch.float64)
    x = torch.randn(32, 12, device=device, dtype=torch.float64)
    target = torch.randn(32, 20, device=device, dtype=torch.float64)
    losses = []
    for layer in (ours, theirs):
        optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(20):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_repr_tells_rank_alpha_and_dropout():
    text = repr(LoRALinear(4, 6, r=2, lora_alpha=8, lora_dropout=0.1))
    assert "in_features=4, out_features=6" in text
    assert "r=2, lora_alpha=8, lora_dropout=0.1" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": -1}, "r must .* -1"),
        ({"r": 1.5}, "r must .* 1.5"),
        ({"r": "4"}, "r must .* '4'"),
        ({"r": True}, "r must .* True"),
        ({"r": None}, "r must .* None"),
        ({"r": 2, "lora_dropout": 1.0}, "lora_dropout must .* 1.0"),
        ({"r": 2, "lora_dropout": -0.1}, "lora_dropout must .* -0.1"),
        ({"r": 2, "lora_dropout": float("nan")}, "lora_dropout must .* nan"),
        ({"r": 2, "lora_dropout": None}, "lora_dropout must .* None"),
        ({"r": 2, "lora_alpha": float("nan")}, "lora_alpha must .* nan"),
        ({"r": 2, "lora_alpha": float("inf")}, "lora_alpha must .* inf"),
        ({"r": 2, "lora_alpha": "16"}, "lora_alpha must .* '16'"),
    ],
    ids=str,
)
def test_bad_arguments_name_argument_value_and_layer(options, match):
    with pytest.raises(ValueError, match=f"^LoRALinear: {match}"):
        LoRALinear(4, 4, **options)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (None, TypeError),
        ([[1.0] * 6], TypeError),
        (torch.eye(6).to_sparse(), TypeError),
        (torch.ones(2, 6, dtype=torch.complex64), TypeError),
        (torch.ones(2, 6, dtype=torch.int64), TypeError),
        (torch.tensor(1.0), ValueError),
        (torch.ones(2, 5), ValueError),
        (torch.ones(6, 5, 4), ValueError),
        (torch.ones(2, 6, dtype=torch.float64), ValueError),
        (torch.ones(2, 6, device="meta"), ValueError),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_bad_x_names_argument_and_layer(x, error, r, training):
    layer = LoRALinear(6, 4, r=r).train(training)
    with pytest.raises(error, match=r"^LoRALinear\(in_features=6.*\): x must"):
        layer(x)


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "linear",
    [None, nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Embedding(4, 4), Scaled(4, 4),
     LoRALinear(4, 4, r=1), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_from_linear_refuses_what_it_would_change(linear):
    with pytest.raises(TypeError, match=r"^LoRALinear: linear must be a plain nn\.Linear"):
        LoRALinear.from_linear(linear, r=2)


def test_dropout_is_that_of_lora_dropout_as_it_stands(seed, device):
    layer = filled(LoRALinear(64, 8, r=4, lora_dropout=0.5, merge_weights=False), device)
    x = torch.randn(16, 64, device=device)
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), layer(x))
    layer.eval().lora_dropout.train()  # Monte Carlo dropout
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout = nn.Identity()
    assert torch.equal(layer(x), layer(x))


def test_replicas_pruned_and_parametrized_layers_keep_their_update(seed, device):
    layer = filled(LoRALinear(6, 8, r=2), device)
    x = torch.randn(3, 6, device=device)
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone())
    assert torch.equal(replica(x), expected)
    pruned = copy.deepcopy(layer)
    nn.utils.prune.random_unstructured(pruned, "lora_A", amount=0.0)
    assert torch.equal(pruned(x), expected)
    nn.utils.parametrize.register_parametrization(layer, "lora_A", nn.Identity())
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("algorithm", ["reference", "fused", "addmm"], indirect=True)
def test_forward_names_factors_that_do_not_fit_a_replaced_weight(algorithm, device):
    layer = LoRALinear(16, 40, r=2, bias=False, merge_weights=False, device=device)
    layer.weight = nn.Parameter(layer.weight[:8].detach())
    with pytest.raises(
        ValueError, match=r"^LoRALinear\(.*: lora_B must have 8 rows, got \[40, 2\]"
    ):
        layer(torch.randn(3, 16, device=device))


def test_forward_takes_parameters_that_were_all_cut(seed, device):
    layer = filled(LoRALinear(5, 6, r=2), device)
    for name in ("weight", "bias", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name)[:4].detach()))
    x = torch.randn(3, 5, device=device)
    assert layer(x).shape == layer.eval()(x).shape == (3, 4)


def test_subclass_may_have_attributes_of_its_own(device):
    class Own(LoRALinear):
        def __init__(self):
            super().__init__(5, 6, r=2, device=device)
            self.dropout_p, self.splits = 0.1, (2, 3)

    assert Own()(torch.randn(3, 5, device=device)).shape == (3, 6)
