"""Hugging Face's Trainer, unmodified, on a patched PEFT model and on a model of apply_lora."""

import copy

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from lora_kernels import apply_lora, patch_peft, report
from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.tiny_models import BASES, LAYERS, TARGETS, randomise

STEPS = 4
LORA = {"r": 3, "lora_alpha": 5}


pytestmark = pytest.mark.usefixtures("unpatched")


def train(model, directory):
    """The losses of a few steps, at their full precision."""
    losses = []
    handle = model.register_forward_hook(lambda module, args, out: losses.append(out.loss.detach()))
    ids = torch.arange(2 * STEPS * 7).view(2 * STEPS, 7) * 5 % 13
    arguments = TrainingArguments(
        directory, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01,
        report_to=[], save_strategy="no", disable_tqdm=True, data_seed=0,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    handle.remove()
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("family", list(BASES))
@pytest.mark.parametrize("kind", ["peft", "apply_lora"])
def test_trainer_has_the_losses_of_peft(kind, family, seed, tmp_path):
    """In float64, to the accuracy of float32: AdamW makes rounding in fewer bits grow."""
    base = randomise(BASES[family]())
    options = {**LORA, "target_modules": TARGETS[family]}
    peft_config = peft.LoraConfig(fan_in_fan_out=family == "gpt2", **options)
    plain = randomise(peft.get_peft_model(base, peft_config)).double()
    if kind == "peft":
        model = copy.deepcopy(plain)
    else:
        model = apply_lora(copy.deepcopy(plain).unload(), **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    other = plain.get_parameter(f"base_model.model.{name}.default.weight")
                    parameter.copy_(other)
    expected = train(plain, tmp_path)
    assert expected[-1] != expected[0]

    patch_peft()
    with Calls() as calls:
        actual = train(model, tmp_path)
    assert calls.fused == STEPS * LAYERS[family]
    assert len(report(model)) == LAYERS[family]
    assert all(row.fused for row in report(model))
    assert_close(actual, expected.double(), expected)
