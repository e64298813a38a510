"""adapter_callback: what a checkpoint of Trainer holds, and what goes on from it."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from lora_kernels import adapter_callback, apply_lora, load_adapter, lora_state_dict
from tests.tiny_models import TARGETS, randomise, tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def own(base):
    return apply_lora(copy.deepcopy(base), r=3, lora_alpha=6, target_modules=TARGETS["llama"])


def trainer(model, directory, callback, steps=4, **options):
    ids = torch.arange(8 * 7).view(8, 7) * 5 % 13
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        directory, max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, report_to=[],
        save_steps=2, disable_tqdm=True, data_seed=0, use_cpu=True, lr_scheduler_type="constant",
        **options,
    )  # fmt: skip
    callbacks = [callback] if callback else []
    return Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


@pytest.fixture
def base(seed):
    return randomise(tiny_llama())


def keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("only", [False, True])
def test_a_checkpoint_has_the_adapter_that_peft_and_load_adapter_open(base, only, tmp_path):
    model = own(base)
    trainer(model, tmp_path, adapter_callback(only)).train()
    folder = tmp_path / "checkpoint-4"
    ids = torch.tensor([[1, 2, 3]])
    expected = model.eval()(ids).logits
    loaded = load_adapter(copy.deepcopy(base), folder / "adapter").eval()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    torch.testing.assert_close(theirs(ids).logits, expected)
    assert (
        keys(folder) == set(lora_state_dict(model)) if only else keys(folder) > {"lm_head.weight"}
    )
    assert not list(folder.glob(".lora*"))


@pytest.mark.parametrize("only", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(base, only, tmp_path):
    whole = own(base)
    start = copy.deepcopy(whole)
    trainer(whole, tmp_path / "whole", None).train()
    trainer(copy.deepcopy(start), tmp_path / "cut", adapter_callback(only), steps=2).train()
    resumed = trainer(start, tmp_path / "cut", adapter_callback(only))
    resumed.train(resume_from_checkpoint=True)
    for name, value in lora_state_dict(whole).items():
        torch.testing.assert_close(lora_state_dict(start)[name], value)


def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    model = own(base)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, adapter_callback(only=True), **options)
    run.train()
    best = run.state.best_model_checkpoint
    expected = load_adapter(copy.deepcopy(base), f"{best}/adapter")
    for name, value in lora_state_dict(expected).items():
        assert torch.equal(lora_state_dict(model)[name], value), name


def test_old_checkpoints_are_removed_as_always(base, tmp_path):
    trainer(own(base), tmp_path, adapter_callback(), save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def of_peft(base):
    return get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS["llama"]))


def named(base):
    return apply_lora(base, adapters={"a": {"r": 2, "lora_alpha": 4}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            of_peft,
            "holds adapters of PEFT .*: Trainer saves them by itself: leave the callback out",
        ),
        (named, r"the model has several adapters.* save_adapter\(model, directory, adapter="),
        (lambda base: base, "the model has no LoRA layer: call apply_lora"),
    ],
)
def test_a_model_that_it_cannot_save_is_told_before_a_step(base, make, message, tmp_path):
    model = make(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"adapter_callback: .*{message}"):
        trainer(model, tmp_path, adapter_callback()).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*"))
