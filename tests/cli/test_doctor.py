"""lora-kernels doctor: exit code, lines and JSON, of this machine and of what could be wrong."""

import re
import sys
import types
import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import Linear as PeftLinear

import lora_kernels
from lora_kernels.cli import doctor, main
from lora_kernels.dispatch import algorithm as algorithms
from lora_kernels.dispatch import cache as caches
from lora_kernels.dispatch.table import TuningEntry
from tests.cli.findings import found

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a CPU")
FORWARD = PeftLinear.forward
KEYS = {
    "python", "versions", "variables", "gpus", "no_gpu", "algorithms", "peft", "notes", "wrong",
    "missing",
}  # fmt: skip


def test_json_holds_what_was_found(capsys, algorithm):
    code, findings = found(capsys)
    assert set(findings) == KEYS
    assert code == (1 if findings["wrong"] or findings["missing"] else 0)
    assert sys.executable in findings["python"]
    assert findings["versions"]["lora_kernels"] == lora_kernels.__version__
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["peft"] == peft.__version__
    assert findings["variables"]["LORA_KERNELS_PLAN"] == algorithm
    assert len(findings["gpus"]) == torch.cuda.device_count()
    assert {row["product"].partition(", [")[0] for row in findings["algorithms"]} == {
        "training, forward",
        "training, backward",
        "decoding",
    }


@without_gpu
@pytest.mark.parametrize(("driver", "lacks"), [(None, False), ("580.1", True)])
def test_doctor_without_a_gpu_says_so(monkeypatch, capsys, driver, lacks):
    """A machine without a GPU lacks nothing, one whose driver answers does."""
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setenv("COLUMNS", "200")
    code, findings = found(capsys)
    assert code == lacks
    assert findings["gpus"] == []
    (said,) = findings["missing" if lacks else "notes"]
    assert said["what"] == findings["no_gpu"]
    assert said["fix"]
    assert all(
        row["device"] == "cpu" and row["algorithm"] == "reference" for row in findings["algorithms"]
    )
    assert main(["doctor"]) == lacks
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["GPU", "none:"] for line in lines)
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    label = "missing " if lacks else "note "
    assert any(line.startswith(label) and findings["no_gpu"] in line for line in lines)


def test_peft_is_fused_under_the_patch_which_is_undone(capsys):
    _, findings = found(capsys)
    assert findings["peft"].split("; ")[0] == "lora.Linear of peft is fused"
    assert PeftLinear.forward is FORWARD


@pytest.mark.parametrize("needed", ["0.0.1", "99.0"])
def test_peft_that_transformers_refuses_is_named(monkeypatch, needed):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", needed)
    refused = doctor.examine().peft.split("; ")[1:]
    if needed == "0.0.1":
        assert refused == []
    else:
        (said,) = refused
        assert said.startswith(f"model.add_adapter() of transformers {transformers.__version__} ")
        assert f"refuses peft {peft.__version__}" in said
        assert said.endswith("please use a version >= 99.0")


def test_patch_that_was_there_stays():
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


def test_package_that_is_not_installed_is_named(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else version(name))
    findings = doctor.examine()
    assert findings.versions["peft"] is None
    assert "pip install peft" in doctor.as_text(findings)
    assert findings.peft == "peft is not installed"
    assert not any("peft" in missing.what for missing in findings.missing)


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
def test_a_home_that_cannot_be_written_is_a_note_on_a_gpu(hopper, algorithm, monkeypatch):
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    findings = doctor.examine_machine()
    assert findings.missing == []
    (note,) = (note for note in findings.notes if "/proc/none/lora_kernels" in note.what)
    assert note.fix.startswith("set LORA_KERNELS_CACHE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "_why_no_gpu", lambda: doctor.NO_DRIVER)
    assert doctor.examine_machine().notes == [doctor.NO_DRIVER]


def test_files_that_are_ignored_are_notes_and_no_warnings(capsys, cache, device):
    tuned, checked = (caches.path_of(kind, device) for kind in ("tuned", "checked"))
    cache.mkdir()
    tuned.write_bytes(b"\xff")
    checked.write_text("[]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = found(capsys)[1]["notes"]
    of_files = {note["what"].split(" is ignored: ")[0]: note for note in notes}
    assert "it cannot be read: 'utf-8'" in of_files[str(tuned)]["what"]
    assert "lora-kernels tune --clear" in of_files[str(tuned)]["fix"]
    assert of_files[str(checked)]["what"].endswith("it is not a file of format 1")
    assert of_files[str(checked)]["fix"] == "lora-kernels check makes it anew"


@without_gpu
def test_what_is_warned_of_variables_is_a_note(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(algorithms, "_said", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = found(capsys)[1]["notes"]
        (note,) = (note for note in notes if note["fix"] == "unset TRITON_INTERPRET")
        assert note["what"].startswith("TRITON_INTERPRET is set: kernels run in")
        monkeypatch.setenv("LORA_KERNELS_PLAN", "sandwich")
        notes = [note for note in doctor.examine().notes if "sandwich" in note.what]
    assert [note.fix for note in notes] == ["set it to the new name"]


def test_warnings_of_others_are_given_again(monkeypatch):
    def warn(device):
        warnings.warn("of PyTorch", UserWarning, stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "_algorithms", warn)
    with pytest.warns(UserWarning, match="of PyTorch"):
        doctor.examine_machine()


# ---- machines that this one is not ----


@pytest.fixture
def hopper(monkeypatch):
    """An H200 for all that is asked of it before a product runs; there is no other GPU."""
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(algorithms, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    monkeypatch.setattr(doctor, "_failures", lambda device: [])
    monkeypatch.setattr(doctor.advice, "compiler", list)
    algorithms.machine_obstacle.cache_clear()
    yield
    algorithms.machine_obstacle.cache_clear()


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
def test_gpu_that_all_is_well_with(hopper, algorithm, capsys):
    code, findings = found(capsys)
    assert findings["gpus"] == [
        {"device": "cuda:0", "name": "NVIDIA H200", "capability": "sm_90", "driver": "580.1"}
    ]
    assert findings["no_gpu"] is None
    assert [(row["device"], row["algorithm"]) for row in findings["algorithms"]] == [
        ("cuda:0", name) for name in ("addmm", "addmm", "fused")
    ]
    assert (code, findings["missing"]) == (0, [])
    assert main(["doctor"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["cuda:0", "NVIDIA H200, sm_90, driver 580.1"] in lines
    assert ["missing", "nothing"] in lines


def test_gpu_that_cuda_does_not_reach_is_missing(hopper, monkeypatch, capsys):
    """The driver counts GPUs without CUDA, which may be too new for it."""
    reason = "The NVIDIA driver on your system is too old (found version 11040)."

    def properties(index):
        raise RuntimeError(f"{reason}\nPlease update it")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    code, findings = found(capsys)
    assert (code, findings["gpus"], findings["no_gpu"]) == (1, [], reason)
    (missing,) = findings["missing"]
    assert missing["what"] == reason
    assert missing["fix"].startswith("update the driver")


def test_gpu_that_is_taken_is_missing(monkeypatch):
    def busy(*shape, **options):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch, "ones", busy)
    (missing,) = doctor._failures(torch.device("cuda", 0))
    assert "cuda:0: CUDA error: all CUDA-capable devices are busy" in missing.what


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
def test_gpu_under_a_variable_that_calls_refuse(hopper, algorithm, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_TUNE", "1")
    monkeypatch.setattr(doctor, "_failures", lambda device: pytest.fail("it would raise"))
    findings = doctor.examine()
    (wrong,) = findings.wrong
    assert wrong.fix == "unset LORA_KERNELS_TUNE"
    assert findings.missing == []


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
def test_algorithm_of_a_backward_is_its_own(hopper, algorithm, monkeypatch):
    entry = TuningEntry((9, 0), torch.bfloat16, "fused", "a.json", m=(8192, 8192), backward=False)
    monkeypatch.setattr(algorithms, "TABLE", (entry,))
    taken = [(row["product"], row["algorithm"]) for row in doctor.examine().algorithms]
    assert taken == [
        ("training, forward, [8192, 4096] x [4096, 4096], r=16, bfloat16", "fused"),
        ("training, backward, [8192, 4096] x [4096, 4096], r=16, bfloat16", "addmm"),
        ("decoding, [1, 4096] x [4096, 4096], r=16, bfloat16", "fused"),
    ]


@pytest.mark.parametrize("algorithm", ["reference"], indirect=True)
def test_gpu_whose_products_are_kept_from_the_kernels(hopper, algorithm, capsys):
    code, findings = found(capsys)
    assert code == 1
    assert findings["missing"] == [
        {"what": "LORA_KERNELS_PLAN=reference", "fix": "unset LORA_KERNELS_PLAN"}
    ]


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
def test_gpu_without_triton(hopper, algorithm, monkeypatch):
    monkeypatch.setattr(algorithms, "_has_triton", lambda: False)
    (missing,) = doctor.examine().missing
    assert missing.what == "triton 3.4 or newer is not installed"
    assert missing.fix.startswith("pip install")


@pytest.mark.parametrize("algorithm", ["auto"], indirect=True)
@pytest.mark.parametrize(
    ("capability", "what", "fix"),
    [
        ((7, 5), "capability (7, 5), below 8.0", "PyTorch's operators run here"),
        ((10, 0), "Triton before 3.7.1", 'pip install --upgrade "triton>=3.7.1"'),
    ],
)
def test_gpu_that_triton_does_not_serve(hopper, algorithm, capability, what, fix, monkeypatch):
    monkeypatch.setattr(algorithms, "capability_of", lambda device: capability)
    monkeypatch.setattr(algorithms, "triton_version", lambda: (3, 6, 0))
    (missing,) = doctor.examine().missing
    assert what in missing.what
    assert missing.fix.startswith(fix)


def test_product_that_fails_on_a_gpu_is_missing(monkeypatch):
    def warn(*args, **kwargs):
        warnings.warn("lora_kernels: algorithm fused failed:\n gcc", RuntimeWarning, stacklevel=1)
        return args[0].sum(0)

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error:\n an illegal address")

    cpu = torch.device("cpu")
    assert doctor._failures(cpu) == []
    monkeypatch.setattr(doctor.functional, "lora_linear", warn)
    (missing,) = doctor._failures(cpu)
    assert missing.what == "lora_kernels: algorithm fused failed: gcc"
    assert "gcc" in missing.fix
    monkeypatch.setattr(doctor.functional, "lora_linear", fail)
    (missing,) = doctor._failures(cpu)
    assert missing.what == "cpu: CUDA error: an illegal address"


@pytest.mark.parametrize(
    ("driver", "cuda", "hidden", "what", "fix"),
    [
        (None, None, None, "no NVIDIA driver answers", "if this machine has no GPU"),
        ("580.1", None, None, "driver 580.1 is there, torch .* is built without CUDA", "pip"),
        ("580.1", "12.8", "", "CUDA_VISIBLE_DEVICES='' shows no GPU", "unset"),
        ("580.1", "12.8", None, "the driver is too old", "update the driver"),
    ],
)
def test_no_gpu_says_why(monkeypatch, driver, cuda, hidden, what, fix):
    def init():
        raise RuntimeError("the driver is too old\nfor this PyTorch")

    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    missing = doctor._why_no_gpu()
    assert re.fullmatch(what, missing.what)
    assert missing.fix.startswith(fix)


def test_the_machine_is_told_before_peft_is_imported(monkeypatch, capsys):
    told = []
    with_peft = doctor.with_peft
    monkeypatch.setattr(
        doctor, "with_peft", lambda found: told.append(capsys.readouterr().out) or with_peft(found)
    )
    main(["doctor"])
    (before,) = told
    assert before.startswith("python ")
    assert "algorithm on" in before
    assert "patch_peft()" not in before
    assert capsys.readouterr().out.startswith("patch_peft() ")


@pytest.mark.parametrize("columns", [60, 80])
def test_lines_fit_the_terminal_and_lose_no_word(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["doctor"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(columns, len(sys.executable) + 30)
    assert "".join(out.split()) == "".join(doctor.as_text(doctor.examine()).split())
