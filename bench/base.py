"""``pytest bench/ --base COMMIT``: the package as it was at a commit, beside that of this tree.

Both run in one process, so that rounds, threads, memory and caches are shared and the ratio is that
of the code alone. For that the files of the commit are laid out under another name, and what they
call lora_kernels, imports and torch operators included, is called by that name.
"""

import contextlib
import functools
import importlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from bench.implementations import Implementation, loralib_layer
from bench.models import put
from lora_kernels.tuning import repository
from lora_kernels.tuning.rows import OURS

__all__ = ["UnknownCommitError", "implementations", "package"]


class UnknownCommitError(Exception):
    """A commit that git does not know, or that does not hold the package."""


@contextlib.contextmanager
def package(commit: str, root: Path = repository.REPOSITORY) -> Iterator[tuple[str, ModuleType]]:
    """(commit in short, the package as it was there), importable until the end.

    Only its public names are to be used: others have changed from commit to commit.
    Raises: UnknownCommitError.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "package.zip")
        try:
            short = repository.git(
                "rev-parse", "--verify", "--short=10", f"{commit}^{{commit}}", repository=root
            )
            repository.git("archive", f"--output={archive}", short, OURS, repository=root)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            text = f"--base {commit} is not a commit that holds {OURS}/: {reason.strip()}"
            raise UnknownCommitError(text) from None
        name = f"{OURS}_at_{short}"
        _unpack(archive, Path(folder), name)
        with mock.patch.object(sys, "path", [*sys.path, folder]):
            yield short, importlib.import_module(name)


def _unpack(archive: Path, folder: Path, name: str) -> None:
    """The Python files of the package in the folder, under a new name throughout."""
    with zipfile.ZipFile(archive) as files:
        for file in files.namelist():
            if file.endswith(".py"):
                text = files.read(file).decode("utf-8")
                path = folder / name / Path(file).relative_to(OURS)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(re.sub(rf"\b{OURS}\b", name, text), encoding="utf-8")


def implementations(short: str, lora: ModuleType) -> dict[str, Implementation]:
    """The package of a commit as a peer of layers and of models, by the kind of their cells."""
    name, build = f"{OURS}@{short}", functools.partial(loralib_layer, lora)
    return {
        "layer": Implementation(name, build, always=True),
        "model": Implementation(name, put(build), always=True),
    }
