"""What two gloo processes do together: every @check, whose failure on a rank is a named result."""

import contextlib
import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lora_kernels
from lora_kernels import functional
from tests.tiny_models import tiny_llama
from tests.tolerance import assert_close

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKS = {}


def check(*parameters):
    """Registers a function once for each of parameters, or once alone."""

    def register(function):
        for values in parameters or ((),):
            CHECKS["-".join([function.__name__, *map(str, values)])] = (function, values)
        return function

    return register


def run(rank: int, directory: str) -> None:
    """One process of two; writes {check: None or what went wrong} into directory."""
    torch.set_num_threads(1)
    directory = Path(directory)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    results = {}
    for name, (function, values) in CHECKS.items():
        scratch = directory / name
        if rank == 0:
            scratch.mkdir()
        torch.manual_seed(42)
        results[name] = None
        try:
            dist.barrier()
            function(scratch, *values)
        except Exception:
            results[name] = traceback.format_exc()
    (directory / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# ---- models, batches, steps ----


def lora_llama(targets=TARGETS, p=0.0, **kwargs) -> nn.Module:
    """A model with LoRA, equal on both ranks, with lora_B that does something."""
    torch.manual_seed(0)
    model = lora_kernels.apply_lora(
        tiny_llama(), r=4, lora_alpha=8, lora_dropout=p, target_modules=targets, **kwargs
    )
    return drawn(model)


def peft_llama() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    return drawn(peft.get_peft_model(tiny_llama(), config))


def drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def joint_batch() -> torch.Tensor:
    return torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(1))


def own_half() -> torch.Tensor:
    return joint_batch().chunk(2)[dist.get_rank()]


def shard(model: nn.Module, how: str, **kwargs) -> nn.Module:
    """fully_shard on each decoder layer and on the root, or on every module with weights too."""
    decoder = model.get_base_model().model if isinstance(model, peft.PeftModel) else model.model
    if how == "leaf":
        leaves = [m for m in model.modules() if m._parameters and not isinstance(m, nn.Embedding)]
        for module in leaves:
            fully_shard(module, **kwargs)
    for layer in decoder.layers:
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def losses_and_gradients(model: nn.Module, ids: torch.Tensor, steps=2):
    """The loss of each step of SGD, and the last step's gradients by the model's own names."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {n.removeprefix("module."): whole(p.grad) for n, p in trained.items()}
    return torch.stack(losses), gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_over_ranks(losses: torch.Tensor) -> torch.Tensor:
    total = losses.clone()
    dist.all_reduce(total)
    return total / 2


def assert_trains_like(model: nn.Module, expected, expected_gradients) -> None:
    """model, wrapped, on the two halves; expected of one process on the joint batch.

    Both in float64 and equal as float32: the order of a sum over the batch shows in neither then.
    """
    losses, gradients = losses_and_gradients(model, own_half())
    losses = mean_over_ranks(losses)
    assert_close(losses.float(), expected, expected.float(), "losses")
    assert gradients
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert_close(gradients[name].float(), expected, expected.float(), name)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=own_half()).logits


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: whole(value).clone() for key, value in model.state_dict().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(whole(value), whole(other[key])), key


def checkpoint_if(wanted: bool, *models: nn.Module) -> None:
    for model in models if wanted else ():
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()


# ---- models of apply_lora ----


@check((False,), (True,))
def ddp(scratch, checkpointing):
    model = lora_llama().double()
    plain = copy.deepcopy(model)
    checkpoint_if(checkpointing, model, plain)
    assert_trains_like(DistributedDataParallel(model), *losses_and_gradients(plain, joint_batch()))


@check()
def ddp_saves_and_loads(scratch):
    model = DistributedDataParallel(lora_llama())
    losses_and_gradients(model, own_half())
    if dist.get_rank() == 0:
        lora_kernels.save_adapter(model, scratch)
    dist.barrier()
    torch.manual_seed(0)
    loaded = lora_kernels.load_adapter(tiny_llama(), scratch)
    assert torch.equal(outputs(loaded), outputs(model))
    other = DistributedDataParallel(lora_llama())
    assert lora_kernels.load_adapter(other, scratch) is other
    assert torch.equal(outputs(other), outputs(model))


@check(("layer", False), ("layer", True), ("leaf", False), ("leaf", True))
def fsdp(scratch, how, checkpointing):
    model = lora_llama([*TARGETS, "embed_tokens"]).double()
    plain = copy.deepcopy(model)
    checkpoint_if(checkpointing, model, plain)
    assert_trains_like(shard(model, how), *losses_and_gradients(plain, joint_batch()))


@check(("layer",), ("leaf",))
def fsdp_mixed_precision(scratch, how):
    model = lora_llama()
    reference = losses_and_gradients(copy.deepcopy(model).double(), joint_batch(), steps=1)
    cast = copy.deepcopy(model)
    for parameter in cast.parameters():  # buffers stay float32, as they do under FSDP
        parameter.data = parameter.data.bfloat16()
    own_loss, own_gradients = losses_and_gradients(cast, own_half(), steps=1)
    shard(model, how, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    losses, gradients = losses_and_gradients(model, own_half(), steps=1)
    assert torch.equal(losses, own_loss)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        baseline = mean_over_ranks(own_gradients[name].float()).bfloat16()
        assert_close(gradient.bfloat16(), reference[1][name], baseline, name)


@check(("layer",), ("leaf",))
def fsdp_saves_and_loads(scratch, how):
    model = shard(lora_llama(), how)
    losses_and_gradients(model, own_half())
    lora_kernels.save_adapter(model, scratch)  # returns when rank 0 has written
    torch.manual_seed(0)
    loaded = lora_kernels.load_adapter(tiny_llama(), scratch)
    assert_same(lora_kernels.lora_state_dict(loaded), lora_kernels.lora_state_dict(model))
    assert torch.equal(outputs(loaded), outputs(model))
    other = shard(lora_llama(), how)
    lora_kernels.load_adapter(other, scratch)
    assert_same(other.state_dict(), model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


@check()
def fsdp_saves_other_kinds_of_layers(scratch):
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = lora_kernels.LoRAEmbedding(13, 8, r=2)
            self.conv = lora_kernels.LoRAConv1d(8, 8, 3, padding=1, r=2)
            self.qkv = lora_kernels.LoRAMergedLinear(8, 24, r=2, enable_lora=[True, False, True])
            self.head = nn.Linear(24, 5)

        def forward(self, input_ids):
            x = self.conv(self.tokens(input_ids).mT).mT
            return self.head(self.qkv(x))

    def kinds():
        model = Kinds()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        return model

    model = kinds()
    lora_kernels.mark_only_lora_as_trainable(model, "lora_only", modules_to_save=["head"])
    plain = copy.deepcopy(model)
    for layer in (model.tokens, model.conv, model.qkv):
        fully_shard(layer)
    fully_shard(model)
    ids = own_half()
    expected = plain(ids)
    assert torch.equal(model(ids), expected)
    lora_kernels.save_adapter(model, scratch)
    other = kinds()
    other.load_state_dict(
        {k: v for k, v in plain.state_dict().items() if "lora" not in k and "head" not in k},
        strict=False,
    )
    lora_kernels.load_adapter(other, scratch)
    assert torch.equal(other(ids), expected)
    assert_same(
        lora_kernels.merged_state_dict(model), lora_kernels.merged_state_dict(plain)
    )  # of sharded layers the same
    model.eval()
    assert torch.equal(model(ids), expected)
    model.train()
    assert_same(model.state_dict(), plain.state_dict())


@check(("layer", True), ("layer", False), ("leaf", True), ("leaf", False))
def fsdp_eval_leaves_weights_alone(scratch, how, reshard):
    model = lora_llama()
    expected, before = outputs(model), state_of(model)
    shard(model, how, reshard_after_forward=reshard)
    for _ in range(2):
        assert torch.equal(outputs(model), expected)
        model.eval()  # with reshard=False the weights lie gathered from the forward before
        assert torch.equal(outputs(model), expected)
        assert_same(model.state_dict(), before)
        model.train()
        assert_same(model.state_dict(), before)
    assert torch.equal(outputs(model), expected)


@check()
def fsdp_of_a_merged_model(scratch):
    model = lora_llama()
    before = state_of(model)
    model.eval()
    shard(model, "layer")
    model.train()  # in time
    assert_same(model.state_dict(), before)

    model = shard(lora_llama().eval(), "layer")
    for call in (lambda: outputs(model), model.train):  # too late: the weights lie gathered
        with pytest.raises(RuntimeError, match="call train\\(\\) on the model before fully_shard"):
            call()


@check(("layer",), ("leaf",))
def fsdp_merged_state_dict(scratch, how):
    model = lora_llama()
    plain = copy.deepcopy(model)
    shard(model, how)
    for _ in range(2):  # sharded, then as a forward leaves it
        assert_same(lora_kernels.merged_state_dict(model), lora_kernels.merged_state_dict(plain))
        outputs(model)


@check(("layer", True), ("leaf", True), ("leaf", False))
def fsdp_shared_inputs(scratch, how, reshard):
    model = lora_llama().double()
    plain = copy.deepcopy(model)
    assert lora_kernels.share_inputs(model)
    shard(model, how, reshard_after_forward=reshard)
    assert_trains_like(model, *losses_and_gradients(plain, joint_batch()))


@check()
def ddp_shared_inputs(scratch):
    model = lora_llama().double()
    plain = copy.deepcopy(model)
    lora_kernels.share_inputs(model)
    assert_trains_like(DistributedDataParallel(model), *losses_and_gradients(plain, joint_batch()))


# ---- PEFT's models ----


@contextlib.contextmanager
def patched():
    """patch_peft() inside; yields the calls that lora_linear took."""
    calls, forward = [], functional.lora_forward

    def counted(layer, *args):
        calls.append(layer)
        return forward(layer, *args)

    functional.lora_forward = counted
    lora_kernels.patch_peft()
    try:
        yield calls
    finally:
        lora_kernels.unpatch_peft()
        functional.lora_forward = forward


@check(("ddp", False), ("ddp", True), ("layer", False), ("layer", True), ("leaf", False))
def patched_peft(scratch, how, checkpointing):
    model = peft_llama().double()
    plain = copy.deepcopy(model)
    checkpoint_if(checkpointing, model, plain)
    model = DistributedDataParallel(model) if how == "ddp" else shard(model, how)
    expected = losses_and_gradients(plain, joint_batch())
    with patched() as calls:
        assert_trains_like(model, *expected)
    # A leaf of lora_A or lora_B gathers its weight in its own forward alone: PEFT's forward runs.
    assert bool(calls) == (how != "leaf")


# ---- dropout ----


@check(("ddp",), ("layer",))
def dropout_masks_differ_between_ranks(scratch, how):
    layer = lora_kernels.LoRALinear(64, 64, r=64, lora_dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
    model = DistributedDataParallel(layer) if how == "ddp" else fully_shard(layer)
    torch.manual_seed(42)
    kept = (model(torch.ones(16, 64)).detach() != 0).float()
    masks = [torch.empty_like(kept) for _ in range(2)]
    dist.all_gather(masks, kept)
    assert all(0.4 < mask.mean() < 0.6 for mask in masks)
    assert 0.4 < (masks[0] != masks[1]).float().mean() < 0.6  # as of independent masks


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
