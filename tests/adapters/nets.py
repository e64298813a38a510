"""A model with every kind of layer in a row, adapted here and in PEFT, and what is compared."""

import copy
import json
import warnings

import peft
import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    apply_lora,
)

KINDS = ["embed", "lin", "mix", "conv1", "conv2", "conv3"]


class Net(nn.Module):
    """Every kind of layer in a row: ids [B, 5] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = Conv1D(12, 8)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=1)
        self.conv3 = nn.Conv3d(1, 4, (1, 2, 3), padding="same")
        self.classifier = nn.Linear(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.mix(self.norm(self.lin(self.embed(ids)))))  # [B, 5, 12]
        x = torch.tanh(self.conv1(x.transpose(1, 2)))  # [B, 8, 5]
        x = torch.tanh(self.conv2(x.unflatten(1, (2, 4))))  # [B, 6, 3, 6]
        x = torch.tanh(self.conv3(x.unsqueeze(1)))  # [B, 4, 6, 3, 6]
        return self.classifier(x.mean((2, 3, 4)))


def randomise(model):
    """Trained values: everything that trains moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"conv2": 3, "embed": 5, "^lin": 1},
        "alpha_pattern": {"mix": 7, "conv.": 1.5},
    },
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["classifier", "norm"]},
    "everything": {
        "use_rslora": True,
        "rank_pattern": {"conv3": 3},
        "alpha_pattern": {"lin": 9},
        "bias": "all",
        "modules_to_save": ["classifier"],
        "lora_dropout": 0.5,
    },
    "regex": {"target_modules": r"(lin|conv\d)"},
    "all-linear": {"target_modules": "all-linear"},
}


def adapted(base, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": KINDS, **options}
    return randomise(apply_lora(copy.deepcopy(base), **options))


def with_peft(base, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": KINDS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself and says so
        return randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))


def load_in_peft(base, directory):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    return model.eval()


def assert_same(actual, expected, dtype=torch.float64):
    """Equal but for the order in which PEFT adds the same products: some tens of roundings."""
    torch.testing.assert_close(actual, expected, rtol=64 * torch.finfo(dtype).eps,
                               atol=64 * torch.finfo(dtype).eps)  # fmt: skip


def assert_equal_states(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def assert_same_files(left, right):
    config = "adapter_config.json"
    assert json.loads((left / config).read_text()) == json.loads((right / config).read_text())
    with (
        safe_open(left / "adapter_model.safetensors", "pt") as one,
        safe_open(right / "adapter_model.safetensors", "pt") as other,
    ):
        assert one.metadata() == other.metadata()
        assert sorted(one.keys()) == sorted(other.keys())
        for key in one.keys():  # noqa: SIM118
            assert torch.equal(one.get_tensor(key), other.get_tensor(key)), key
