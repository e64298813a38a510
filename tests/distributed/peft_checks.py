"""What has to hold on every rank for PEFT models that ``lora-kernels run`` has patched."""

import functools
import importlib.util

import peft
import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import MixtralConfig, MixtralForCausalLM

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.testing.tolerance import assert_close
from tests.distributed.engines import (
    ENGINES,
    STEPS,
    assert_same,
    cross_entropy,
    train,
    train_alone,
    trainable,
    wrap,
)  # fmt: skip
from tests.op_calls import Calls
from tests.quantized import quantised
from tests.tiny_models import randomise, tiny_llama

CHECKS = {}
PATCHED_FROM_OUTSIDE = hasattr(PeftLinear.forward, "__wrapped__")
TARGETS = ["q_proj", "down_proj"]  # of a Llama with two blocks
LAYERS = 4
MIXTRAL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 13,
}  # fmt: skip


def check(function, *case):
    CHECKS[", ".join([function.__name__, *case])] = functools.partial(function, *case)


def peft_model(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **options)
    return randomise(peft.get_peft_model(tiny_llama(), config))


def layers(model):
    return list(model.base_model.model.model.layers)


def loss_of(model, ids):
    return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids * 7 % 13)


def batch():
    return torch.arange(4 * 7).view(4, 7) * 5 % 13


def run_patches_it_when_it_is_imported(_):
    assert PATCHED_FROM_OUTSIDE


check(run_patches_it_when_it_is_imported)


def losses_and_factors_are_those_of_one_unpatched_process(engine, mode, _):
    recompute = mode == "checkpointed"
    wrapped = wrap(peft_model(), engine, layers, recompute=recompute)
    with Calls() as calls:
        actual = train(wrapped, loss_of, batch())
    expected = STEPS * LAYERS * (2 if recompute else 1)
    # Sharded one by one, base layers and factors are gathered by hooks: PEFT's own code runs.
    assert calls.fused == (0 if engine == "per leaf" else expected)
    unpatch_peft()
    try:
        baseline = train_alone(peft_model(), loss_of, batch())
        reference = train_alone(peft_model().double(), loss_of, batch())
    finally:
        patch_peft()
    for name, value in baseline.items():
        assert_close(actual[name], reference[name], value, name)


def moe_model(implementation="grouped_mm"):
    """LoRA on the experts of a Mixtral with two blocks."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    model.config._experts_implementation = implementation
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets)
    return randomise(peft.get_peft_model(model, config))


def experts(model):
    """The outermost wrappers of PEFT, which have all of a block's experts inside."""
    return [layer.mlp.experts for layer in layers(model)]


def experts_give_losses_and_factors_of_one_unpatched_process(engine, mode, _):
    recompute, blocks = mode == "checkpointed", experts if engine == "per experts" else layers
    engine = engine.replace("per experts", "per layer")
    wrapped = wrap(moe_model(), engine, blocks, recompute=recompute)
    with Calls() as calls:
        actual = train(wrapped, loss_of, batch())
    expected = STEPS * 2 * 2 * (2 if recompute else 1)
    assert calls.names.count("lora_grouped_linear_forward") == expected
    unpatch_peft()
    try:
        baseline = train_alone(moe_model(), loss_of, batch())
        reference = train_alone(moe_model("eager").double(), loss_of, batch())
    finally:
        patch_peft()
    for name, value in baseline.items():
        assert_close(actual[name], reference[name], value, name)


def quantised_model():
    """peft_model() over weights of 4 bits, stored in the dtype that all of it has."""
    torch.manual_seed(0)
    model = randomise(tiny_llama())
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(TARGETS)):
            n, k = module.weight.shape
            model.set_submodule(path, quantised("nf4-float32", n, k, bias=False))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def quantised_layers_give_losses_and_factors_of_one_unpatched_process(engine, mode, _):
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    recompute = mode == "checkpointed"
    wrapped = wrap(quantised_model(), engine, layers, recompute=recompute)
    with Calls() as calls:
        actual = train(wrapped, loss_of, batch())
    assert calls.names.count("add_lora") == STEPS * LAYERS * (2 if recompute else 1)
    unpatch_peft()
    try:
        expected = train_alone(quantised_model(), loss_of, batch())
    finally:
        patch_peft()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def mixed_precision_is_that_of_one_process_with_cast_weights(engine, mode, _):
    """Bit for bit: both sides do the same arithmetic, per leaf that of PEFT."""
    recompute = mode == "checkpointed"
    wrapped = wrap(peft_model(), engine, layers, recompute=recompute, dtype=torch.bfloat16)
    actual = train(wrapped, loss_of, batch())
    if engine == "per leaf":
        unpatch_peft()
    try:
        alone = train_alone(peft_model(), loss_of, batch(), torch.bfloat16, parts=2)
    finally:
        patch_peft()
    assert_same(actual, alone)


def a_trained_adapter_that_rank_0_saves_reloads(engine, directory):
    wrapped = wrap(peft_model(), engine, layers)
    train(wrapped, loss_of, batch())
    if engine == "ddp":
        model, state = wrapped.module, None
    else:
        options = StateDictOptions(full_state_dict=True)
        model, state = wrapped, get_model_state_dict(wrapped, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=state)
    dist.barrier()
    base = peft_model().unload()
    loaded = peft.PeftModel.from_pretrained(base, directory, is_trainable=True)
    assert_same(trainable(loaded), trainable(wrapped))


def ranks_with_one_seed_drop_different_elements(_):
    model = peft_model(lora_dropout=0.5)
    torch.manual_seed(42)
    with Calls() as calls:
        logits = model(input_ids=batch(), use_cache=False).logits.detach()
    assert calls.fused == LAYERS
    of_ranks = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(of_ranks, logits)
    assert not torch.equal(*of_ranks)


for engine in ENGINES:
    for mode in ("plain", "checkpointed"):
        check(losses_and_factors_are_those_of_one_unpatched_process, engine, mode)
        if engine != "ddp":
            check(mixed_precision_is_that_of_one_process_with_cast_weights, engine, mode)
    check(a_trained_adapter_that_rank_0_saves_reloads, engine)
for engine in ("ddp", "per layer"):
    for mode in ("plain", "checkpointed"):
        check(quantised_layers_give_losses_and_factors_of_one_unpatched_process, engine, mode)
for engine in ("ddp", "per layer", "per experts"):  # PEFT fails if factors are sharded alone
    for mode in ("plain", "checkpointed"):
        check(experts_give_losses_and_factors_of_one_unpatched_process, engine, mode)
check(ranks_with_one_seed_drop_different_elements)
