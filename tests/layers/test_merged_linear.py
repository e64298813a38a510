"""LoRAMergedLinear: loralib as the oracle, unequal groups, and what loralib gets wrong."""

import copy

import loralib
import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRALinear, LoRAMergedLinear
from lora_kernels.testing.tolerance import assert_close
from tests.layers.cases import filled, output_and_gradients

ENABLED = [
    [True],
    [True, False, True],
    [False, True, False],
    [True, True, True],
    [False, True],
    [False, False, False, True],
]
enabled = pytest.mark.parametrize("enable_lora", ENABLED, ids=str)
GQA = {"enable_lora": [True, False, True], "out_splits": (16, 4, 4)}


def twins(options, device):
    """A layer here and one of loralib with the same parameters."""
    ours = filled(LoRAMergedLinear(12, 24, **options), device)
    theirs = loralib.MergedLinear(12, 24, **options).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@enabled
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_loralibs(enable_lora, fan_in_fan_out, training, seed, device):
    options = {"r": 3, "lora_alpha": 6, "enable_lora": enable_lora, "merge_weights": False}
    options["fan_in_fan_out"] = fan_in_fan_out
    ours, theirs = (layer.train(training) or layer for layer in twins(options, device))
    exact = copy.deepcopy(ours).double()
    x, dy = torch.randn(2, 7, 12, device=device), torch.randn(2, 7, 24, device=device)
    results = [output_and_gradients(layer, x, dy) for layer in (ours, exact, theirs)]
    assert results[0].keys() == results[2].keys() == {"y", "x", "lora_A", "lora_B", "bias"}
    for name, result in results[0].items():
        assert_close(result, results[1][name], results[2][name], name)


@enabled
def test_merge_ab_zero_pad_and_lora_ind_are_loralibs(enable_lora, seed, device):
    ours, theirs = twins({"r": 2, "enable_lora": enable_lora}, device)
    torch.testing.assert_close(ours.merge_AB(), theirs.merge_AB())
    assert torch.equal(ours.lora_ind, theirs.lora_ind)
    rows = torch.randn(24 * sum(enable_lora) // len(enable_lora), 5, device=device)
    assert torch.equal(ours.zero_pad(rows), theirs.zero_pad(rows))


@enabled
def test_merged_weights_and_checkpoints_are_loralibs(enable_lora, seed, device):
    ours, theirs = twins({"r": 2, "enable_lora": enable_lora}, device)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    back = LoRAMergedLinear(12, 24, r=2, enable_lora=enable_lora).to(device)
    back.load_state_dict(theirs.state_dict())
    theirs.eval()
    torch.testing.assert_close(ours.eval().merged_weight(), theirs.weight)
    torch.testing.assert_close(back.eval().complete_weight(), theirs.weight)


@pytest.mark.parametrize("r", [0, 4])
def test_initial_values_are_loralibs_at_the_same_seed(r, seed):
    torch.manual_seed(seed)
    ours = LoRAMergedLinear(12, 24, r=r, enable_lora=[True, False])
    torch.manual_seed(seed)
    theirs = loralib.MergedLinear(12, 24, r=r, enable_lora=[True, False])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_positional_arguments_keep_loralibs_order():
    layer = LoRAMergedLinear(6, 8, 2, 4, 0.25, [True, False], True, False)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout.p) == (2, 4, 0.25)
    assert layer.enable_lora == [True, False]
    assert layer.fan_in_fan_out
    assert not layer.merge_weights
    assert isinstance(layer, nn.Linear)
    assert lora_kernels.MergedLinear is LoRAMergedLinear


# ---- faults of loralib, corrected ----


@pytest.mark.parametrize("options", [{}, {"enable_lora": [False, False]}])
def test_layer_without_an_enabled_group_is_a_plain_trainable_linear(options, seed, device):
    layer = LoRAMergedLinear(12, 24, r=4, **options).to(device)
    assert not layer.has_lora
    assert layer.weight.requires_grad
    x = torch.randn(3, 12, device=device)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), expected)
    with pytest.raises(AttributeError):
        loralib.MergedLinear(12, 24, r=4)(torch.randn(3, 12))  # what is corrected


def test_training_does_not_build_the_full_delta(seed, device):
    layer = filled(LoRAMergedLinear(64, 96, r=2, enable_lora=[True, False, True]), device)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    with RecordShapes() as record:
        layer(x).sum().backward()
    assert (5, 96) in record.shapes
    assert not record.shapes & {(96, 64), (64, 96), (64, 64), (1, 96, 64), (1, 64, 64)}


class RecordShapes(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes of all tensors that operators allocate inside the block."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            is_new = isinstance(tensor, torch.Tensor) and (
                tensor.untyped_storage().data_ptr() not in inputs
            )
            if is_new:
                self.shapes.add(tuple(tensor.shape))
        return result


def test_lora_ind_is_right_after_meta_to_empty_to_and_deepcopy(device):
    expected = [True] * 8 + [False] * 8 + [True] * 8
    options = {"r": 2, "enable_lora": [True, False, True]}
    layer = LoRAMergedLinear(12, 24, **options, device="meta").to_empty(device=device)
    assert layer.lora_ind.tolist() == expected
    assert layer.lora_ind.device.type == device.type
    assert copy.deepcopy(layer).double().lora_ind.tolist() == expected
    assert "lora_ind" not in layer.state_dict()
    theirs = loralib.MergedLinear(12, 24, **options, device="meta").to_empty(device=device)
    assert theirs.lora_ind.is_meta  # what is corrected


# ---- unequal groups ----


def test_groups_of_unequal_size_are_separate_linears_side_by_side(seed, device):
    layer = filled(LoRAMergedLinear(12, 24, r=3, lora_alpha=6, **GQA), device)
    query, key, value = (LoRALinear(12, n, r=r, lora_alpha=6) for n, r in ((16, 3), (4, 0), (4, 3)))
    with torch.no_grad():
        for part, weight in zip((query, key, value), layer.weight.split([16, 4, 4]), strict=True):
            part.to(device).weight.copy_(weight)
        for part, bias in zip((query, key, value), layer.bias.split([16, 4, 4]), strict=True):
            part.bias.copy_(bias)
        query.lora_A.copy_(layer.lora_A[:3])
        value.lora_A.copy_(layer.lora_A[3:])
        query.lora_B.copy_(layer.lora_B[:16])
        value.lora_B.copy_(layer.lora_B[16:])
    x = torch.randn(5, 12, device=device)
    expected = torch.cat([part(x) for part in (query, key, value)], -1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.lora_ind.tolist() == [True] * 16 + [False] * 4 + [True] * 4


def test_groups_share_one_dropout_mask(seed, device):
    layer = LoRAMergedLinear(
        32, 16, r=2, lora_dropout=0.5, enable_lora=[True, True], bias=False, merge_weights=False
    )
    with torch.no_grad():  # the same update in both groups: they differ only by their masks
        layer.weight[8:] = layer.weight[:8]
        layer.lora_A[2:] = layer.lora_A[:2]
        layer.lora_B.copy_(torch.randn(8, 2).repeat(2, 1))
    layer.to(device)
    y = layer(torch.randn(9, 32, device=device))
    assert torch.equal(y[:, :8], y[:, 8:])


def test_from_linear_keeps_the_fused_projection(seed, device):
    linear = nn.Linear(12, 24).to(device)
    x = torch.randn(3, 12, device=device)
    layer = LoRAMergedLinear.from_linear(linear, 2, **GQA)
    assert layer.weight is linear.weight
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_A.shape == (4, 12)
    assert layer.lora_B.shape == (20, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"enable_lora": [True] * 5}, r"enable_lora .*24.*\[True"),
        ({"enable_lora": []}, r"enable_lora .*\[\]"),
        ({"enable_lora": [1, 0]}, r"enable_lora .*\[1, 0\]"),
        ({"enable_lora": "yes"}, "enable_lora .*'yes'"),
        ({"enable_lora": None}, "enable_lora .*None"),
        ({"enable_lora": True}, "enable_lora .*True"),
        ({"enable_lora": [True, True], "out_splits": (12,)}, r"out_splits .*\(12,\)"),
        ({"enable_lora": [True, True], "out_splits": (12, 13)}, r"out_splits .*24.*13"),
        ({"enable_lora": [True, True], "out_splits": (24, 0)}, r"out_splits .*\(24, 0\)"),
        ({"enable_lora": [True, True], "out_splits": (12.0, 12.0)}, r"out_splits .*12.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("r", [0, 2])
def test_bad_groups_name_argument_value_and_layer(options, match, r):
    with pytest.raises(ValueError, match=f"^LoRAMergedLinear: .*{match}"):
        LoRAMergedLinear(12, 24, r=r, **options)


@pytest.mark.parametrize("algorithm", ["reference", "fused", "addmm"], indirect=True)
@pytest.mark.parametrize("sizes", [[8, 8, 9], [12, 12], [0, 0, 24], [-8, 24, 8], None], ids=str)
def test_forward_names_out_splits_that_were_changed(algorithm, sizes, device):
    layer = LoRAMergedLinear(12, 24, r=2, enable_lora=[True, False, True], device=device)
    layer.out_splits = sizes
    expected = r"^LoRAMergedLinear\(.*: out_splits must be a list of 3 integers >= 1, .* to the 24 "
    with pytest.raises(ValueError, match=expected):
        layer(torch.randn(3, 12, device=device))


def test_out_splits_may_be_any_iterable():
    options = {"r": 2, "enable_lora": [True, False]}
    layer = LoRAMergedLinear(12, 3, out_splits={"q": 1, "k": 2}.values(), **options)
    assert layer.out_splits == [1, 2]
