"""What has to hold on every rank for models of apply_lora. A check raises if it does not."""

import copy
import functools
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lora_kernels as lora
from lora_kernels.testing.tolerance import assert_close
from tests.distributed.engines import (
    ENGINES,
    assert_same,
    cross_entropy,
    mine,
    train,
    train_alone,
    trainable,
    whole,
    wrap,
)
from tests.model import wrapped

CHECKS = {}
SHARDED = ENGINES[1:]


def check(*cases):
    """Registers a check once for each tuple of arguments, under a name that says so."""

    def register(function):
        for case in cases or [()]:
            name = ", ".join([function.__name__, *map(str, case)])
            CHECKS[name] = functools.partial(function, *case)
        return function

    return register


# ---- a model with a layer of each kind, ids [B, T] -> logits [B, T, 11] ----


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x):
        x = x + torch.relu(self.gate(x)) * self.up(x)
        x = x + self.down(torch.relu(self.qkv(x)))
        return x + self.mix(x.mT).mT


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 11)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_with_lora(dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    model = Model()
    for block in model.blocks:  # what a fused projection in a model becomes
        block.qkv = lora.LoRAMergedLinear.from_linear(
            block.qkv, 2, 4, dropout, enable_lora=[True, False, True], **options
        )
    lora.apply_lora(
        model, r=3, lora_alpha=5, lora_dropout=dropout, modules_to_save="head",
        target_modules=["embedding", "gate", "up", "down", "mix"], **options,
    )  # fmt: skip
    draw_factors(model)
    return model


def draw_factors(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].startswith("lora_"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def blocks(model):
    return [model.embedding, *model.blocks]


def loss_of(model, ids):
    return cross_entropy(model(ids), ids * 7 % 11)


def batch(seed=1):
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(seed))


# ---- training ----


MODES = ("plain", "checkpointed", "shared", "shared, checkpointed")


@check(*[(engine, on) for engine in ENGINES for on in MODES])
def losses_and_factors_are_those_of_one_process(engine, mode, _):
    model = model_with_lora()
    wrapped = wrap(model, engine, blocks, recompute="checkpointed" in mode)
    if "shared" in mode:
        lora.share_inputs(wrapped, [("gate", "up")])
    actual = train(wrapped, loss_of, batch())
    baseline = train_alone(model, loss_of, batch())
    reference = train_alone(model.double(), loss_of, batch())
    assert len(actual) == 1 + 2 * 11 + 2  # losses; A and B of eleven layers; the head
    for name, value in baseline.items():
        assert_close(actual[name], reference[name], value, name)
    assert not torch.equal(actual["losses"][0], actual["losses"][-1])


@check(*[(engine, on) for engine in SHARDED for on in ("plain", "checkpointed")])
def mixed_precision_is_that_of_one_process_with_cast_weights(engine, mode, _):
    """Bit for bit: both sides do the same arithmetic."""
    model, dtype = model_with_lora(), torch.bfloat16
    wrapped = wrap(model, engine, blocks, recompute=mode == "checkpointed", dtype=dtype)
    actual = train(wrapped, loss_of, batch())
    assert_same(actual, train_alone(model, loss_of, batch(), dtype, parts=2))
    full = train_alone(model, loss_of, batch(), parts=2)
    assert not torch.equal(actual["losses"], full["losses"])


# ---- dropout ----


@check(*[(engine, on) for engine in ENGINES for on in ("plain", "checkpointed")])
def dropout_is_that_of_every_rank_for_itself(engine, mode, _):
    """The mean of what each rank computes alone; checkpointed, the mask is drawn again the same."""
    alone = model_with_lora(0.5)
    wrapped = wrap(alone, engine, blocks, recompute=mode == "checkpointed")
    torch.manual_seed(42)
    loss_of(wrapped, mine(batch())).backward()
    torch.manual_seed(42)
    loss_of(alone, mine(batch())).backward()
    parameters = dict(alone.named_parameters())
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            expected = parameters[name.removeprefix("module.")].grad
            dist.all_reduce(expected)
            assert torch.equal(whole(parameter.grad), expected / 2), name


@check(("eager",), ("compiled",))
def ranks_with_one_seed_drop_different_elements(mode, _):
    layer = lora.LoRALinear(16, 16, r=4, lora_dropout=0.5)
    draw_factors(layer)
    call = layer if mode == "eager" else torch.compile(layer, backend="eager", fullgraph=True)

    def of_ranks(module):
        torch.manual_seed(42)
        drawn = module(torch.ones(3, 16)).detach()
        outputs = [torch.empty_like(drawn) for _ in range(2)]
        dist.all_gather(outputs, drawn)
        return outputs

    first, second = of_ranks(call)
    assert not torch.equal(first, second)
    assert torch.equal(first, of_ranks(layer)[0])  # the seed repeats, compiled or not
    first, second = of_ranks(nn.Dropout(0.5))
    assert torch.equal(first, second)  # what the layers do not do


# ---- eval ----


@check(*[(engine,) for engine in SHARDED])
def eval_of_a_sharded_model_computes_the_update_on_the_fly(engine, _):
    model = model_with_lora(merge_weights=True)
    sharded = wrap(model, engine, blocks)
    before = model.state_dict()
    expected = model_with_lora(merge_weights=False).eval()(batch())
    sharded(batch())  # leaves the weights of the root gathered
    for _ in range(2):
        sharded.eval()
        assert not any(m.merged for m in sharded.modules() if isinstance(m, lora.LoRALayer))
        assert torch.equal(sharded(batch()), expected)
        for module in sharded.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        assert torch.equal(sharded(batch()), expected)
        sharded.train()
    assert_same(sharded.state_dict(), before)


@check()
def eval_merges_under_ddp(_):
    model = model_with_lora(merge_weights=True)
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(batch())
    ddp = wrap(model, "ddp", blocks).eval()
    assert all(m.merged for m in ddp.modules() if isinstance(m, lora.LoRALayer))
    assert torch.equal(ddp(batch()), expected)
    assert_same(ddp.train().module.state_dict(), before)


@check()
def a_model_merged_before_it_is_sharded_computes_the_update_on_the_fly(_):
    model = model_with_lora(merge_weights=True)
    before = copy.deepcopy(model.state_dict())
    expected = model_with_lora(merge_weights=False).eval()(batch())
    sharded = fully_shard(model.eval())
    assert torch.equal(sharded(batch()), expected)
    assert not any(m.merged for m in sharded.modules() if isinstance(m, lora.LoRALayer))
    assert_same(sharded.state_dict(), before)
    assert_same(sharded.train().state_dict(), before)


@check()
def a_convolution_sharded_inside_its_layer_says_so(_):
    layer = lora.LoRAConv1d(4, 4, 3, r=2)
    fully_shard(layer.conv)
    with pytest.raises(
        RuntimeError, match=r"LoRAConv1d\(4, 4.*apply fully_shard to the LoRA layer"
    ):
        layer(torch.ones(1, 4, 8))


# ---- state dicts and adapters ----


@check(*[(engine,) for engine in ENGINES])
def a_saved_adapter_reloads(engine, directory):
    model = model_with_lora(seed=3)
    wrapped = wrap(model, engine, blocks)
    wrapped(mine(batch()))
    if engine != "ddp" or dist.get_rank() == 0:
        lora.save_adapter(wrapped, directory)
    dist.barrier()
    fresh = model_with_lora(seed=4)
    assert lora.load_adapter(fresh, directory) is fresh
    assert_same(lora.lora_state_dict(fresh), lora.lora_state_dict(model))


@check(*[(engine,) for engine in ENGINES])
def an_adapter_loads_into_a_wrapped_model(engine, directory):
    model = model_with_lora(seed=3)
    if dist.get_rank() == 0:
        lora.save_adapter(model, directory)
    dist.barrier()
    wrapped = wrap(model_with_lora(seed=4), engine, blocks)
    wrapped(mine(batch()))
    assert lora.load_adapter(wrapped, directory) is wrapped
    assert_same(trainable(wrapped), trainable(model))


@check(*[(engine,) for engine in SHARDED])
def pytorchs_own_functions_gather_and_spread_the_factors(engine, _):
    model, options = model_with_lora(seed=3), StateDictOptions(full_state_dict=True)
    sharded = wrap(model, engine, blocks)
    gathered = get_model_state_dict(
        sharded, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )
    assert_same(gathered, lora.lora_state_dict(model))
    assert_same(lora.lora_state_dict(sharded), gathered)
    other = wrap(model_with_lora(seed=3), engine, blocks)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(other, gathered, options=options)
    assert_same(trainable(other), trainable(model))


@check(*[(engine,) for engine in SHARDED])
def the_merged_state_dict_is_that_of_the_whole_model(engine, _):
    model = model_with_lora()
    expected = lora.merged_state_dict(model)
    sharded = wrap(model, engine, blocks)
    sharded(batch())
    assert_same(lora.merged_state_dict(sharded), expected)


@check()
def merge_AB_of_a_sharded_layer_is_that_of_the_whole_one(_):
    layer = lora.LoRAMergedLinear(8, 12, r=2, enable_lora=[True, False, True])
    draw_factors(layer)
    expected = layer.merge_AB()
    assert expected.any()
    assert torch.equal(whole(fully_shard(copy.deepcopy(layer)).merge_AB()), expected)


@check()
def lora_goes_into_a_model_before_it_is_sharded(directory):
    with pytest.raises(ValueError, match=re.escape("down (FSDPLinear) cannot get a LoRA layer")):
        lora.apply_lora(
            wrap(Model(), "per leaf", blocks), r=2, lora_alpha=2, target_modules=["down"]
        )
    sharded = fully_shard(Model())
    for _ in range(2):
        with pytest.raises(ValueError, match="call apply_lora before fully_shard"):
            lora.apply_lora(sharded, r=2, lora_alpha=2, target_modules=["down"])
        sharded(batch())  # leaves the weights of the root gathered


@check()
def adapters_travel_between_the_first_fsdp_and_the_plain_model(directory):
    base, x = wrapped.Net(), torch.randn(5, 6)
    model = wrapped.adapted(base)
    sharded = wrapped.in_fsdp(copy.deepcopy(model))
    assert sharded.blocks[0].up.lora_A.dim() == 1  # this rank's part of it
    lora.save_adapter(sharded, directory)
    dist.barrier()
    assert torch.equal(lora.load_adapter(copy.deepcopy(base), directory)(x), model(x))
    again = wrapped.in_fsdp(wrapped.adapted(base))
    assert torch.equal(lora.load_adapter(again, directory)(x), model(x))
    wrapped.assert_same(lora.lora_state_dict(again), lora.lora_state_dict(model))
    with pytest.raises(ValueError, match=r"before .* FSDP"):
        lora.load_adapter(wrapped.in_fsdp(copy.deepcopy(base)), directory)
    with pytest.raises(ValueError, match="summon_full_params"):
        lora.merged_state_dict(again)
    with FullyShardedDataParallel.summon_full_params(again, writeback=False):
        merged = lora.merged_state_dict(again)
    wrapped.assert_same(merged, lora.merged_state_dict(model))
