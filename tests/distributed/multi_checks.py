"""What has to hold on every rank for a model with several adapters, some absent on one rank."""

import copy
import functools

import torch
import torch.distributed as dist

import lora_kernels as lora
from tests.distributed.engines import whole, wrap
from tests.model.multi_cases import ADAPTERS, alone, example, model_with_adapters

CHECKS = {}
NAMES = (["a", "b"], ["b", "c"])  # of each rank; nobody has d


def check(function, *case):
    CHECKS[", ".join([function.__name__, *case])] = functools.partial(function, *case)


def backward(model, names):
    torch.manual_seed(dist.get_rank())
    x = example(names)
    with lora.route(model, names, seeds=dict.fromkeys(ADAPTERS, 3)):
        model(x.requires_grad_()).sum().backward()


def gradients_are_means_over_the_ranks(engine, mode, _):
    model, names = model_with_adapters(), NAMES[dist.get_rank()]
    local = copy.deepcopy(model)
    backward(local, names)
    recompute = mode == "checkpointed"
    wrapped = wrap(model, engine, lambda m: m.blocks, recompute=recompute, unused=True)
    for _ in range(2):
        wrapped.zero_grad()
        backward(wrapped, names)
        own = {n.removeprefix("module."): p for n, p in wrapped.named_parameters()}
        for name, parameter in local.named_parameters():
            if not parameter.requires_grad:
                continue
            mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(mean)
            grad = own[name].grad
            if name.endswith("_d") and engine == "ddp":
                assert grad is None, name
            else:
                assert torch.equal(whole(grad), mean / 2), name


def an_adapter_of_a_sharded_model_is_saved_and_merged(directory):
    model = model_with_adapters()
    sharded = wrap(model, "per layer", lambda m: m.blocks)
    lora.save_adapter(sharded, directory, adapter="c")
    dist.barrier()
    loaded = lora.load_adapter(alone(model, None), directory)
    expected = lora.merged_state_dict(model, adapter="c")
    merged = lora.merged_state_dict(sharded, adapter="c")
    again = lora.merged_state_dict(loaded)
    for name, value in expected.items():
        assert torch.equal(whole(merged[name]), value), name
        assert torch.equal(again[name], value), name


for engine in ("ddp", "per layer"):
    for mode in ("plain", "checkpointed"):
        check(gradients_are_means_over_the_ranks, engine, mode)
check(an_adapter_of_a_sharded_model_is_saved_and_merged)
