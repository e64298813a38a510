"""``pytest -m mutants``: the tests of the kernels have to notice faults put into the kernels."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KERNELS = Path("lora_kernels/kernels")
# What finds most faults soonest comes first.
SUITE = [
    "tests/kernels/test_linear.py::test_output_and_gradients", "tests/kernels/test_dropout.py",
    "tests/kernels/test_launch.py", "tests/kernels/test_offsets.py",
    "tests/kernels/test_kernels.py", "tests/kernels/test_linear.py",
    "tests/test_shared.py",
]  # fmt: skip


def mutants() -> dict[str, tuple[str, str, str]]:
    """By fault: the file, what is written there, what stands there in the mutant."""
    lines = (Path(__file__).parent / "mutants.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.replace("\\n", "\n").split("\t") for line in lines[1:])
    return {fault: tuple(rest) for fault, *rest in rows}


MUTANTS = mutants()


def noticed(name: str, folder: Path) -> bool:
    """Whether the suite fails on a copy of the repository with this fault in it."""
    file, written, mutated = MUTANTS[name]
    for part in ("lora_kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        copy(REPOSITORY / part, folder / part)
    path = folder / KERNELS / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(written, mutated), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *SUITE],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode == 1


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_has_one_place(name):
    file, written, mutated = MUTANTS[name]
    assert (REPOSITORY / KERNELS / file).read_text(encoding="utf-8").count(written) == 1
    assert mutated != written


@pytest.mark.mutants
def test_the_suite_notices_nearly_every_fault(tmp_path):
    folders = {name: tmp_path / str(i) for i, name in enumerate(MUTANTS)}
    for folder in folders.values():
        folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(MUTANTS, pool.map(noticed, MUTANTS, folders.values()), strict=True))
    missed = [name for name, found in results.items() if not found]
    print(f"{len(results) - len(missed)} of {len(results)} faults noticed; missed: {missed}")
    assert len(missed) <= 0.05 * len(results)
