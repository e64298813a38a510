"""What was measured on this GPU decides before all other tables."""

import json

import pytest
import torch

from lora_kernels.dispatch import algorithm as algorithms
from lora_kernels.dispatch import cache as caches
from lora_kernels.dispatch import measured
from lora_kernels.dispatch.algorithm import Algorithm, choose, is_open
from lora_kernels.dispatch.table import GemmShape, TuningEntry

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def automatic(cache, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_PLAN", "auto")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def shape(**changes) -> GemmShape:
    values = {"m": 100, "n": 40, "k": 48, "r": 4, "dtype": torch.float32, "device": CPU}
    return GemmShape(**{**values, **changes})


def entry(algorithm="addmm", **changes) -> dict:
    bounds = {"m": (64, 200), "n": (40, 40), "k": (48, 48), "r": (4, 4), "tma": None}
    fields = {"dropout": False, "backward": False, **bounds, **changes}
    return measured.as_json(
        TuningEntry((0, 0), torch.float32, algorithm, measured.SOURCE, **fields), (1.2, 1.1, 1.3)
    )


def test_an_entry_decides_within_its_bounds_and_nowhere_else():
    measured.add(CPU, [entry()])
    assert choose(shape()) == Algorithm("addmm", "measured on this GPU")
    assert not is_open(choose(shape()))
    for outside in ({"m": 63}, {"m": 201}, {"n": 41}, {"r": 5}, {"dropout": True},
                    {"backward": True}, {"dtype": torch.float16}):  # fmt: skip
        assert choose(shape(**outside)) == Algorithm("fused", "TRITON_INTERPRET=1"), outside
        assert is_open(choose(shape(**outside)))


def test_another_process_reads_the_entry_and_the_newest_one_holds():
    measured.add(CPU, [entry("addmm")])
    measured.add(CPU, [entry("fused", m=(1, float("inf")))])
    measured.forget()
    assert choose(shape()).name == "fused"
    assert choose(shape(m=10**9)) == Algorithm("fused", "measured on this GPU")
    measured.add(CPU, [entry("addmm", m=(1, float("inf")))])  # replaces its equal
    assert choose(shape()).name == "addmm"
    assert len(measured.content(CPU)["algorithms"]) == 2


def test_what_two_processes_measure_is_kept_of_both(cache):
    measured.content(CPU)  # read before the other writes
    other = {"algorithms": [entry("fused", n=(7, 7))], "tiles": []}
    caches.write(measured.KIND, CPU, other)
    measured.add(CPU, [entry("addmm")])
    measured.forget()
    assert choose(shape(n=7)).reason == choose(shape()).reason == "measured on this GPU"


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "fastest"}, {"dtype": "float33"}, {"dtype": "nn"}, {"m": [1]}, {"m": "ab"},
        {"k": None}, {"n": [1, "x"]}, {"r": [1, 10**400]}, {"dropout": "maybe", "r": None},
    ],
)  # fmt: skip
def test_a_file_with_another_content_is_ignored(change):
    caches.write(measured.KIND, CPU, {"algorithms": [{**entry(), **change}], "tiles": []})
    with pytest.warns(RuntimeWarning, match="is ignored: .*Error"):
        assert choose(shape()).name == "fused"


@pytest.mark.parametrize("content", [{"algorithms": 3, "tiles": []}, {"tiles": [1]}, {"x": 1},
                                     {"algorithms": [], "tiles": [1]}])  # fmt: skip
def test_a_file_without_entries_is_ignored(content):
    caches.write(measured.KIND, CPU, content)
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert choose(shape()).name == "fused"


@pytest.mark.parametrize("content", [{"x": 1}, {"algorithms": [], "tiles": 5},
                                     {"algorithms": [3], "tiles": []}])  # fmt: skip
def test_what_is_measured_takes_the_place_of_a_bad_file(content):
    caches.write(measured.KIND, CPU, content)
    with pytest.warns(RuntimeWarning, match="is ignored"):
        measured.add(CPU, [entry()])
    measured.forget()
    assert choose(shape()).reason == "measured on this GPU"


def test_what_cannot_be_written_holds_in_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        measured.add(CPU, [entry()])
    assert choose(shape()).name == "addmm"


def test_the_variable_goes_before_it(monkeypatch):
    measured.add(CPU, [entry()])
    for name in algorithms.ALGORITHMS:
        monkeypatch.setenv("LORA_KERNELS_PLAN", name)
        assert choose(shape()).name == name


def test_the_file_is_strict_json(cache):
    measured.add(CPU, [entry(m=(1, float("inf")))])
    (path,) = cache.glob("*.json")
    refuse = {"parse_constant": lambda name: pytest.fail(name)}
    (found,) = json.loads(path.read_text(), **refuse)["content"]["algorithms"]
    assert found["m"] == [1, None]
