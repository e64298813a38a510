"""lora-kernels run of a training script on Hugging Face's Trainer, and the same on apply_lora."""

import runpy
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.testing.tolerance import assert_close
from tests.op_calls import Calls
from tests.peft_models import config
from tests.tiny_models import BASES, LAYERS, randomise

pytestmark = pytest.mark.usefixtures("unpatched")

STEPS = 4
# Scripts as people have them. BASE and ADAPTER are folders; in float64, because AdamW makes
# rounding in fewer bits grow from step to step.
SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
{imports}

base, adapter, output, *resume = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
{load}
arguments = TrainingArguments(
    output, max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1,
    save_steps=2, report_to=[], disable_tqdm=True,
)
ids = torch.arange(56).view(8, 7) * 5 % 13
data = [{{"input_ids": row, "labels": row}} for row in ids]
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train(resume_from_checkpoint=bool(resume))
{save}
"""
SCRIPTS = {
    "peft": SCRIPT.format(
        imports="from peft import PeftModel",
        load="model = PeftModel.from_pretrained(model, adapter, is_trainable=True)",
        save="model.save_pretrained(output)",
    ),
    "apply_lora": SCRIPT.format(
        imports="import lora_kernels",
        load="lora_kernels.load_adapter(model, adapter)",
        save="lora_kernels.save_adapter(model, output)",
    ),
}


@pytest.fixture(params=list(BASES))
def family(request):
    return request.param


@pytest.fixture
def program(tmp_path, family, in_process):
    """program(kind, name, resume=, dropout=, patched=): the trained adapter, and fused calls."""
    base, script = tmp_path / "base", tmp_path / "train.py"
    randomise(BASES[family]()).save_pretrained(base)

    def run(kind, name, *resume, dropout=0.0, patched=True):
        adapter, output = tmp_path / f"adapter-{dropout}", tmp_path / name
        if not adapter.exists():
            model = peft.get_peft_model(BASES[family](), config(family, lora_dropout=dropout))
            randomise(model).save_pretrained(adapter)
        script.write_text(SCRIPTS[kind])
        arguments = [str(part) for part in (script, base, adapter, output, *resume)]
        with Calls() as calls:
            if patched:
                assert in_process(["run", *arguments]) == 0
            else:
                sys.argv = arguments
                runpy.run_path(str(script), run_name="__main__")
        return load_file(output / "adapter_model.safetensors"), calls.fused

    return run


def test_run_trains_what_the_script_trains_under_python(program, family, seed):
    expected, none = program("peft", "plain", patched=False)
    assert none == 0
    for kind in SCRIPTS:
        actual, fused = program(kind, kind)
        assert fused == STEPS * LAYERS[family]
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(actual[name].float(), value.double(), value.float(), name)


@pytest.mark.parametrize("kind", list(SCRIPTS))
def test_run_resumes_from_a_checkpoint_with_the_same_masks(program, family, kind, seed, tmp_path):
    expected, _ = program(kind, "whole", dropout=0.4)
    undropped, _ = program(kind, "undropped")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    actual, fused = program(kind, "again", "--resume", dropout=0.4)
    assert fused == STEPS // 2 * LAYERS[family]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not all(torch.equal(undropped[name], expected[name]) for name in expected)
