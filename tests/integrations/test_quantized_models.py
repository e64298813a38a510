"""Whole models that transformers loads in 4 and 8 bits: trained with the patch and without."""

import functools
import math

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, load_adapter, patch_peft, report, save_adapter, unpatch_peft
from tests.op_calls import Calls
from tests.quantized import quantised

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LAYERS, STEPS = 14, 6
LORA = {"r": 4, "lora_alpha": 8}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("nf4-nested", "int8", "torchao-int8", "hqq-4", "quanto-int8")
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.fixture(autouse=True)
def own_products(monkeypatch):
    """Losses are compared with PEFT's, so a CPU multiplies as PEFT has it do."""
    monkeypatch.setenv("LORA_KERNELS_CPU_PRODUCTS", "own")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama of two blocks with weights of 16 bits, on disk."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return directory


def load(directory, kind, dtype=torch.bfloat16):
    quantization = None
    if kind.startswith("nf4"):
        pytest.importorskip("bitsandbytes")
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=kind == "nf4-nested",
        )  # fmt: skip
    elif kind == "int8":
        pytest.importorskip("bitsandbytes")
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif kind == "torchao-int8":
        torchao = pytest.importorskip("torchao.quantization")
        quantization = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    elif kind == "quanto-int8":
        pytest.importorskip("optimum.quanto")
        quantization = transformers.QuantoConfig(weights="int8")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization, device_map="cpu", dtype=dtype
    )
    if kind.startswith("hqq"):  # transformers 5 does not load these any more
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, module in list(parent.named_children()):
                    if isinstance(module, nn.Linear):
                        n, k = module.weight.shape
                        base = quantised(kind, n, k, bias=False, dtype=dtype)
                        setattr(parent, name, base)
    return model


def batch():
    ids = torch.arange(4 * 16).view(4, 16) * 7 % 61
    return {"input_ids": ids, "labels": ids}


def adapted(model, checkpointing=None, kbit=False, **options):
    """PEFT's LoRA on every linear; checkpointing: None, "reentrant" or "non-reentrant"."""
    kwargs = {"use_reentrant": checkpointing == "reentrant"}
    if kbit:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=False, gradient_checkpointing_kwargs=kwargs
        )
    torch.manual_seed(1)
    options = {**LORA, "target_modules": TARGETS, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model.train()


def train(model, autocast=False):
    """The losses of a few steps of AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.01), []
    torch.manual_seed(2)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return losses


def assert_losses(actual, expected, dtype):
    """AdamW makes rounding grow from step to step."""
    limit = 1e-4 if dtype == torch.float32 else 1e-3
    worst = max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))
    assert worst <= limit, (worst, actual, expected)


# The dtype of the model, options of its adapter, and of its training.
WAYS = {
    "float32": (torch.float32, {}, {}),
    "bfloat16": (torch.bfloat16, {}, {}),
    "autocast": (torch.bfloat16, {}, {"autocast": True}),
    "prepared": (torch.bfloat16, {"kbit": True}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@every_kind
def test_trains_as_without_the_patch(kind, way, saved):
    if kind.startswith(("hqq", "quanto")) and way == "prepared":
        pytest.skip("the model runs in float32 then, which such weights do not, without a patch")
    dtype, of_model, of_training = WAYS[way]
    expected = train(adapted(load(saved, kind, dtype), **of_model), **of_training)
    patch_peft()
    model = adapted(load(saved, kind, dtype), **of_model)
    with Calls() as calls:
        losses = train(model, **of_training)
    assert calls.names.count("add_lora") == STEPS * LAYERS
    assert calls.names.count("lora_linear_backward") == STEPS * LAYERS
    rows = report(model)
    assert len(rows) == LAYERS
    assert all(row.fused for row in rows), rows
    assert_losses(losses, expected, dtype)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])
def test_checkpointing_changes_no_digit(kind, checkpointing, saved):
    patch_peft()
    dropout = {"lora_dropout": 0.1}
    expected = train(adapted(load(saved, kind), **dropout))
    model = adapted(load(saved, kind), checkpointing, **dropout)
    with Calls() as calls:
        losses = train(model)
    assert calls.names.count("add_lora") == 2 * STEPS * LAYERS
    assert losses == expected


@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_an_evaluation_between_steps_changes_nothing(kind, saved):
    """On a CPU with AVX512-BF16 eval() packs 4-bit weights, which then have no backward."""
    patch_peft()
    expected = train(adapted(load(saved, kind)))
    model = adapted(load(saved, kind))

    def evaluate(module, _args, _output):
        if module.training and torch.is_grad_enabled():
            module.eval()
            with torch.no_grad():
                module(**batch(), use_cache=False)
            module.train()

    model.register_forward_hook(evaluate)
    assert_losses(train(model), expected, torch.bfloat16)
    assert all(row.fused for row in report(model))


@every_kind
def test_a_saved_adapter_is_pefts(kind, saved, tmp_path):
    """Trained under the patch, then loaded by PEFT alone over the same base."""
    patch_peft()
    model = adapted(load(saved, kind))
    train(model)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        ours = model(**batch()).logits.float()
    unpatch_peft()
    plain = peft.PeftModel.from_pretrained(load(saved, kind), tmp_path).eval()
    with torch.no_grad():
        theirs = plain(**batch()).logits.float()
        base = load(saved, kind)(**batch()).logits.float()
    assert (ours - theirs).norm() <= 0.02 * (theirs - base).norm()


@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])
def test_generates_the_tokens_of_peft(kind, saved):
    model = adapted(load(saved, kind), init_lora_weights=False).eval()
    ids = batch()["input_ids"][:2, :5]
    generate = functools.partial(
        model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
        do_sample=False,
    )  # fmt: skip
    expected = generate()
    patch_peft()
    with Calls() as calls:
        tokens = generate()
    assert calls.names.count("add_lora") == 4 * LAYERS
    assert torch.equal(tokens, expected)


@every_kind
def test_own_layers_train_as_pefts_and_their_files_load(kind, saved, tmp_path):
    dtype = torch.float32
    reference = adapted(load(saved, kind, dtype))
    start = {name: p.clone() for name, p in reference.named_parameters() if "lora_" in name}
    expected = train(reference)
    model = apply_lora(load(saved, kind, dtype), target_modules=TARGETS, **LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(start[f"base_model.model.{name}.default.weight"])
    losses = train(model.train())
    assert_losses(losses, expected, dtype)
    rows = report(model)
    assert len(rows) == LAYERS
    assert all(row.fused for row in rows)

    save_adapter(model, tmp_path)
    fresh = load_adapter(load(saved, kind, dtype), tmp_path).train()
    with torch.no_grad():
        assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


def trainer_losses(saved, directory, make, **options):
    model = make(load(saved, "nf4-nested"))
    arguments = transformers.TrainingArguments(
        directory, max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, report_to=[],
        save_strategy="no", disable_tqdm=True, data_seed=0, logging_steps=1, use_cpu=True,
        **options,
    )  # fmt: skip
    ids = batch()["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in torch.cat([ids, ids + 1, ids + 2])]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_runs_unchanged(checkpointing, saved, tmp_path, fresh_accelerate):
    make = functools.partial(adapted, kbit=True)
    options = {"bf16": True, "gradient_checkpointing": checkpointing}
    expected = trainer_losses(saved, tmp_path, make, **options)
    patch_peft()
    with Calls() as calls:
        losses = trainer_losses(saved, tmp_path, make, **options)
    assert calls.names.count("add_lora") == 3 * LAYERS * (1 + checkpointing)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)


def test_sft_trainer_of_trl_runs_unchanged(saved, tmp_path, fresh_accelerate):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {**{f"w{i}": i for i in range(62)}, "<pad>": 62, "</s>": 63}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="w0"
    )
    texts = [" ".join(f"w{(i * (k + 1)) % 62}" for i in range(16)) for k in range(12)]

    def run():
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
            learning_rate=0.01, save_strategy="no", disable_tqdm=True, data_seed=0, seed=0,
            logging_steps=1, use_cpu=True, bf16=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=load(saved, "nf4-nested"), args=arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **LORA),
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, report(trainer.model)

    expected, _ = run()
    patch_peft()
    losses, rows = run()
    assert len(rows) == LAYERS
    assert all(row.fused for row in rows)
    assert all(math.isfinite(loss) for loss in losses)
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
