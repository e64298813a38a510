"""What training under patch_peft() says once: how many layers train on this package."""

import logging
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from lora_kernels import patch_peft, unpatch_peft
from lora_kernels.integrations.peft import patch
from tests.tiny_models import tiny_llama

IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(autouse=True)
def heard(unpatched, monkeypatch):
    for name in ("LORA_KERNELS_QUIET", "LORA_KERNELS_REPORT", "RANK"):
        monkeypatch.delenv(name, raising=False)


def model(**options):
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **options}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).train()


def train(model, steps=1):
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()


def count(model) -> int:
    return sum(isinstance(m, peft.tuners.lora.layer.LoraLayer) for m in model.modules())


def test_the_second_step_says_what_the_first_one_counted(capsys):
    patch_peft()
    net = model()
    train(net)
    assert capsys.readouterr().err == ""
    train(net, steps=3)
    number = count(net)
    assert capsys.readouterr().err == (
        f"lora_kernels: {number} of {number} LoRA layers of PEFT train on lora_kernels\n"
    )
    assert not patch._census.is_open
    train(model(), steps=3)
    assert capsys.readouterr().err == ""


def test_layers_that_peft_runs_are_counted_by_reason(capsys):
    patch_peft()
    net = model()
    net.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    net.base_model.set_adapter(["default", "other"])
    train(net, steps=2)
    half = count(net) // 2
    assert capsys.readouterr().err == (
        f"lora_kernels: {half} of {2 * half} LoRA layers of PEFT train on lora_kernels; PEFT's own "
        f"code runs {half} ({half}: 2 of its adapters are active, and each has a dropout mask)\n"
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_all_counted(reentrant, capsys):
    patch_peft()
    net = model()
    net.enable_input_require_grads()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(net, steps=2)
    number = count(net)
    assert f"{number} of {number} LoRA layers" in capsys.readouterr().err


def test_what_does_not_train_is_not_counted(capsys):
    patch_peft()
    net = model()
    with torch.no_grad():
        net(IDS)
    net.eval()
    train(net, steps=3)
    assert capsys.readouterr().err == ""
    assert patch._census.is_open


def test_a_layer_that_is_called_twice_in_a_step_is_no_second_step(capsys):
    patch_peft()
    shared = nn.Linear(4, 4)
    net = peft.get_peft_model(
        nn.Sequential(shared, shared, nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0", "2"])
    ).train()
    for _ in range(2):
        net(torch.ones(1, 4)).sum().backward()
    assert "2 of 2 LoRA layers" in capsys.readouterr().err


def test_quiet(monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_QUIET", "1")
    patch_peft()
    train(model(), steps=3)
    assert capsys.readouterr().err == ""


def test_one_process_of_several_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    patch_peft()
    train(model(), steps=3)
    assert capsys.readouterr().err == ""


def test_a_program_that_has_set_up_logging_gets_it_there(caplog, capsys):
    patch_peft()
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        train(model(), steps=2)
    (record,) = [record for record in caplog.records if record.name == "lora_kernels"]
    assert record.getMessage().endswith("LoRA layers of PEFT train on lora_kernels")
    assert capsys.readouterr().err == ""


def test_the_report_is_printed_if_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_REPORT", "1")
    patch_peft()
    net = model()
    train(net, steps=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lora_kernels: ")
    assert lines[1].startswith(f"{count(net)} LoRA layers: ")
    assert lines[3].split()[0] == "Linear"


def test_a_compiled_model_says_nothing_and_is_not_compiled_again(capsys):
    patch_peft()
    net = model(lora_dropout=0.0)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(IDS).logits.sum().backward()
    assert capsys.readouterr().err == ""


def test_unpatch_forgets(capsys):
    patch_peft()
    net = model()
    train(net)
    unpatch_peft()
    train(net)
    assert capsys.readouterr().err == ""


def test_a_program_of_one_step_says_it_at_its_end(tmp_path):
    code = """
import sys, torch, peft, lora_kernels
from torch import nn
lora_kernels.patch_peft()
net = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
net(torch.ones(1, 4)).sum().backward()
print("before", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "before", "lora_kernels: 1 of 1 LoRA layers of PEFT train on lora_kernels",
    ]  # fmt: skip
