"""Environment variables as doctor lists them: wrong values, names that nothing reads."""

import re
from pathlib import Path

import pytest

from lora_kernels.cli import main
from lora_kernels.cli.variables import OF_TESTS
from tests.cli.findings import found


@pytest.mark.parametrize("algorithm", ["fastest"], indirect=True)
def test_variable_with_a_value_that_it_does_not_take_is_wrong(capsys, monkeypatch, algorithm):
    code, findings = found(capsys)
    assert code == 1
    assert findings["missing"] == []
    (wrong,) = findings["wrong"]
    assert "fastest" in wrong["what"]
    assert wrong["fix"] == "unset LORA_KERNELS_PLAN"
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 1
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["wrong", f"{wrong['what']}: {wrong['fix']}"] in lines
    assert ["missing", "nothing"] in lines


WRONG = {
    "LORA_KERNELS_CPU_PRODUCTS": "auto, float32, own",
    "LORA_KERNELS_CHECK": "0, 1",
    "LORA_KERNELS_QUIET": "0, 1",
    "LORA_KERNELS_REPORT": "0, 1",
    "LORA_KERNELS_TUNE": "0, first-use",
}


@pytest.mark.parametrize(("name", "values"), WRONG.items())
def test_other_variables_with_such_a_value_are_wrong_too(capsys, monkeypatch, name, values):
    for value in values.split(", "):
        monkeypatch.setenv(name, value)
        assert found(capsys)[1]["wrong"] == []
    monkeypatch.setenv(name, "yes")
    code, findings = found(capsys)
    assert code == 1
    assert findings["variables"][name] == "yes"
    assert findings["missing"] == []
    assert findings["wrong"] == [
        {"what": f"{name} must be one of {values}, got 'yes'", "fix": f"unset {name}"}
    ]


def test_a_cache_that_cannot_be_written_is_wrong(capsys, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "inside", "/proc/none/cache"):
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(path))
        code, findings = found(capsys)
        assert code == 1
        (wrong,) = findings["wrong"]
        assert wrong["what"].startswith(f"the cache directory {path} cannot be written, ")
        assert "set LORA_KERNELS_CACHE to a directory" in wrong["fix"]
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "new" / "cache"))
    assert found(capsys)[0] == 0
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("nearest", "misspelt"),
    [
        ("LORA_KERNELS_PLAN", lambda name: f"{name}S"),
        ("LORA_KERNELS_CACHE", lambda name: name.replace("KERNELS", "KERNEL")),
        ("LORA_KERNELS_CPU_PRODUCTS", lambda name: name[:-1]),
        ("LORA_KERNELS_QUIET", str.lower),
    ],
)
def test_a_name_that_nothing_reads_is_a_note(capsys, monkeypatch, nearest, misspelt):
    name = misspelt(nearest)
    monkeypatch.setenv("LORA_KERNELS_TEST_SEED", "1")
    before = found(capsys)[1]["notes"]
    assert not any("nothing reads" in note["what"] for note in before)
    monkeypatch.setenv(name, "1")
    code, findings = found(capsys)
    assert code == 0
    (note,) = (note for note in findings["notes"] if note not in before)
    assert note == {"what": f"nothing reads {name}", "fix": f"the nearest name is {nearest}"}


def test_every_variable_of_the_page_is_listed(capsys):
    page = Path(__file__).parents[2] / "docs/reference/environment.md"
    text = page.read_text("utf-8")
    of_tests = text[text.index("Variables of the tests") : text.index("Others' variables")]
    assert set(OF_TESTS) == set(re.findall(r"`(LORA_KERNELS_[A-Z_]+)", of_tests))
    told = set(re.findall(r"`((?:LORA_KERNELS|TRITON|OMP)_[A-Z_]+)", text.replace(of_tests, "")))
    assert set(found(capsys)[1]["variables"]) == told | {"CUDA_VISIBLE_DEVICES"}
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert told <= {line.split()[0] for line in lines if not line.startswith(" ")}
