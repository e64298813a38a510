"""``pytest -m mutants``: the tests of the kernels have to notice faults put into the kernels."""

import ast
import concurrent.futures
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import mutation

REPOSITORY = Path(__file__).parents[2]
# What finds most faults soonest comes first; then the tests of the file that has the fault.
SOONEST = [
    "tests/kernels/test_linear.py::test_output_and_gradients",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_numerics.py",
    "tests/kernels/test_offsets.py",
]
REST = [
    "tests/kernels", "tests/ops/test_shared_input.py",
    # They test no kernel.
    *(f"--ignore=tests/kernels/test_{name}.py" for name in ("mutants", "gate", "races")),
]  # fmt: skip
MUTANTS = mutation.read()


def noticed(name: str, folder: Path) -> bool:
    """Whether the suite fails on a copy of the repository with this fault in it."""
    mutant = MUTANTS[name]
    for part in ("lora_kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        copy(REPOSITORY / part, folder / part)
    copied = folder / mutant.file.relative_to(REPOSITORY)
    copied.write_text(mutant.source(), encoding="utf-8")
    own = f"tests/kernels/test_{mutant.file.name}"
    parts = [SOONEST, [own] if (folder / own).exists() else [], REST]
    return any(_fails(part, folder) for part in parts if part)


def _fails(part: list[str], folder: Path) -> bool:
    """Whether a part of the suite fails. pytest would reorder parts that overlap in one run."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *part],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # A fault that writes outside its memory may end the process by a signal.
    assert done.returncode <= 1, done.stdout + done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_has_one_place(name):
    mutant = MUTANTS[name]
    assert len(mutant.places()) == 1
    assert ast.dump(ast.parse(mutant.source())) != ast.dump(ast.parse(mutant.file.read_text()))


@pytest.mark.parametrize(
    ("written", "mutated", "expected"),
    [
        ("tl.where(any_keep, any_x, 0.0)", "any_x", "y = tile + (x)"),
        ("tile + tl.where(any_a, any_b, any_c)", "any_c", "y = (0.0)"),
        ("any_same + any_same", "any_same", None),
        ("tl.where(keep, other, any_c)", "any_c", None),
    ],
)
def test_a_fault_is_found_by_what_is_written(written, mutated, expected, tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    # ü\n    y = tile + tl.where(\n        keep, x, 0.0\n    )\n")
    mutant = mutation.Mutant(file, "f", written, mutated)
    assert len(mutant.places()) == (expected is not None)
    assert expected is None or expected in mutant.source()


@pytest.mark.mutants
def test_the_suite_notices_nearly_every_fault(tmp_path):
    folders = {name: tmp_path / str(i) for i, name in enumerate(MUTANTS)}
    for folder in folders.values():
        folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        missed = []
        for name, found in zip(MUTANTS, pool.map(noticed, MUTANTS, folders.values()), strict=True):
            print(f"{'noticed' if found else 'MISSED'}: {name}", flush=True)
            missed += [name] * (not found)
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} faults noticed; missed: {missed}")
    assert len(missed) <= 0.05 * len(MUTANTS)
