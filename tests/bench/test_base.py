"""The package at a commit, beside the one of this tree."""

import subprocess
import sys

import pytest
import torch

import lora_kernels
from bench import base
from bench.cells import Cell
from bench.implementations import IMPLEMENTATIONS, choose
from bench.measure import LayerSubject, measure
from lora_kernels.tuning import repository

CELL = Cell(m=32, k=48, n=40, r=4, dropout_p=0.25, mode="forward+backward")
FILES = {
    "__init__.py": "from lora_kernels.layer import Linear\n",
    "layer.py": (
        "import torch\n\nlibrary = torch.library.Library('lora_kernels', 'FRAGMENT')\n"
        "library.define('only_in_tests(Tensor x) -> Tensor')\n\n\nclass Linear:\n"
        "    operator = torch.ops.lora_kernels.only_in_tests\n"
    ),
    "py.typed": "",
}


@pytest.fixture
def checkout(tmp_path):
    """A repository whose second commit has the package."""

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, text=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    package = tmp_path / "lora_kernels"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    git("add", ".")
    git("commit", "-m", "second")
    (package / "layer.py").write_text("what no commit holds")
    return tmp_path


def test_package_is_the_one_of_the_commit_with_imports_and_operators_of_its_own(checkout):
    path = sys.path[:]
    with base.package("HEAD", checkout) as (short, lora):
        assert len(short) == 10
        assert lora.__name__ == f"lora_kernels_at_{short}"
        assert lora.Linear.__module__ == f"lora_kernels_at_{short}.layer"
        assert str(lora.Linear.operator).startswith(f"lora_kernels_at_{short}.")
    assert sys.path == path
    assert sys.modules["lora_kernels"] is lora_kernels
    assert not hasattr(torch.ops.lora_kernels, "only_in_tests")


@pytest.mark.parametrize(
    ("commit", "reason"),
    [("no-such-commit", "fatal"), ("HEAD~1", "lora_kernels"), ("--help", "fatal")],
)
def test_package_of_an_unknown_commit_says_what_git_does(checkout, commit, reason):
    with (
        pytest.raises(
            base.UnknownCommitError,
            match=f"--base {commit} is not a commit that holds lora_kernels/: .*{reason}",
        ),
        base.package(commit, checkout),
    ):
        pass


@pytest.mark.skipif(
    repository.commit() == repository.UNVERSIONED, reason="an archive has no commit to measure"
)
def test_implementations_are_peers_that_always_take_part_and_are_checked():
    with base.package("HEAD") as (short, lora):
        name = f"lora_kernels@{short}"
        at_base = base.implementations(short, lora)
        assert at_base["layer"].build(CELL.problem()).__class__ is lora.Linear
        compared = choose(CELL, ["addmm"], [*IMPLEMENTATIONS, at_base["layer"]])
        assert list(compared) == ["frozen", "addmm", "lora_kernels", name]
        rows, samples = measure(CELL, LayerSubject(CELL), compared, seconds=0.0)
    assert rows[name]["skipped"] is None
    assert len(rows[name]["ours_over_peer"]) == 3
    assert len(samples[name]) == len(samples["lora_kernels"])
    assert at_base["model"].name == name
