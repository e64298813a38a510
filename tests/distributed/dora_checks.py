"""What has to hold on every rank for layers with a magnitude that fully_shard shards."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_kernels import apply_lora, load_adapter, merged_state_dict, save_adapter
from lora_kernels.distributed import full_tensor


def step(model):
    """The output and the whole gradient of every factor. All ranks have the same batch."""
    model.zero_grad()
    y = model(torch.arange(24.0, dtype=torch.float64).view(4, 6).cos())
    y.pow(2).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach()} | {name: full_tensor(grad) for name, grad in trained.items()}


def sharded_magnitudes_give_the_same_results(directory):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    apply_lora(model, r=2, lora_alpha=4, use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected, merged = step(model), merged_state_dict(model)
    sharded = copy.deepcopy(model)
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    torch.testing.assert_close(step(sharded), expected)
    for name, value in merged_state_dict(sharded).items():
        torch.testing.assert_close(full_tensor(value), merged[name])
    save_adapter(sharded, directory / "adapter")
    sharded[0].reset_lora_parameters()
    norms = torch.linalg.vector_norm(model[0].weight, dim=1)
    torch.testing.assert_close(full_tensor(sharded[0].lora_magnitude), norms, check_dtype=False)
    load_adapter(sharded, directory / "adapter")
    torch.testing.assert_close(step(sharded.eval()), expected)


CHECKS = {check.__name__: check for check in (sharded_magnitudes_give_the_same_results,)}
