"""What has to hold on every rank for experts that fully_shard shards, alone or with their layer."""

import copy
import functools

import torch
from torch.distributed.fsdp import fully_shard

from lora_kernels import apply_lora, load_adapter, merged_state_dict, report, save_adapter
from lora_kernels.distributed import full_tensor
from tests.experts import TARGETS, drawn, whole

CHECKS = {}


def check(*cases):
    def register(function):
        for case in cases:
            CHECKS[f"{function.__name__}, {case}"] = functools.partial(function, case)
        return function

    return register


def step(model):
    """The loss, and the whole gradient of every factor. All ranks have the same batch."""
    ids = torch.arange(24).view(2, 12) * 7 % 40
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {name: full_tensor(grad) for name, grad in trained.items()}


@check("experts alone", "with their layer")
def sharded_experts_give_the_same_bits(how, directory):
    numbers = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
    model = drawn(apply_lora(whole("qwen3_moe"), **numbers, target_parameters=TARGETS))
    expected, merged = step(model), merged_state_dict(model)
    sharded = copy.deepcopy(model)
    for layer in sharded.model.layers:
        if how == "experts alone":
            fully_shard(layer.mlp.experts)
        fully_shard(layer)
    fully_shard(sharded)
    rows = [row for row in report(sharded) if "LoRAExperts(" in row.kind]
    assert len(rows) == 4
    assert all("ask in the forward" in row.reason for row in rows)
    for _ in range(2):
        actual = step(sharded)
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    for name, value in merged_state_dict(sharded).items():
        assert torch.equal(full_tensor(value), merged[name]), name
    save_adapter(sharded, directory / "adapter")
    other = drawn(sharded)
    load_adapter(other, directory / "adapter")
    assert torch.equal(step(other)["loss"], expected["loss"])
