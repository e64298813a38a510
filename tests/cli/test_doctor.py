"""lora-kernels doctor: exit code, lines and JSON, of this machine and of what could be wrong."""

import json
import sys

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear

import lora_kernels
from lora_kernels.cli import doctor, main

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a CPU")
FORWARD = PeftLinear.forward
KEYS = {"python", "versions", "variables", "gpus", "no_gpu", "plans", "peft", "missing"}


def found(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_holds_what_was_found(capsys, plan):
    code, findings = found(capsys)
    assert set(findings) == KEYS
    assert code == (1 if findings["missing"] else 0)
    assert sys.executable in findings["python"]
    assert findings["versions"]["lora_kernels"] == lora_kernels.__version__
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["peft"] == peft.__version__
    assert findings["variables"]["LORA_KERNELS_PLAN"] == plan
    assert len(findings["gpus"]) == torch.cuda.device_count()
    assert {row["product"].partition(",")[0] for row in findings["plans"]} == {
        "training",
        "decoding",
    }


@without_gpu
def test_without_a_gpu_it_says_so(capsys):
    code, findings = found(capsys)
    assert code == 1
    assert findings["gpus"] == []
    assert findings["missing"][0]["what"] == findings["no_gpu"]
    assert findings["missing"][0]["mend"]
    assert all(row["device"] == "cpu" and row["plan"] == "reference" for row in findings["plans"])
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["GPU", "none:"] for line in lines)
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    assert any(line.startswith("missing ") and findings["no_gpu"] in line for line in lines)


def test_peft_is_fused_under_the_patch_which_is_undone(capsys):
    _, findings = found(capsys)
    assert findings["peft"] == "lora.Linear of peft is fused"
    assert PeftLinear.forward is FORWARD


def test_a_patch_that_was_there_stays():
    lora_kernels.patch_peft()
    try:
        patched = PeftLinear.forward
        doctor.examine()
        assert PeftLinear.forward is patched
    finally:
        lora_kernels.unpatch_peft()


def test_peft_that_is_not_fused_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "patch_peft", lambda: None)
    findings = doctor.examine()
    assert "patch_peft() has not been called" in findings.peft
    assert findings.peft in [missing.what for missing in findings.missing]


def test_peft_that_cannot_be_imported_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    findings = doctor.examine()
    assert findings.peft.startswith("peft cannot be imported: ")
    assert findings.peft in [missing.what for missing in findings.missing]


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    findings = doctor.examine()
    assert findings.versions["peft"] is None
    assert "pip install peft" in doctor.as_text(findings)
    assert findings.peft == "peft is not installed"
    assert not any("peft" in missing.what for missing in findings.missing)


@pytest.mark.parametrize("plan", ["fastest"], indirect=True)
def test_a_plan_that_does_not_exist_is_missing(capsys, plan):
    code, findings = found(capsys)
    assert code == 1
    assert any(
        "fastest" in missing["what"] and missing["mend"] == "unset LORA_KERNELS_PLAN"
        for missing in findings["missing"]
    )
