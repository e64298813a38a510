"""The commit that is measured; figures are only kept of one that is committed."""

import subprocess
from pathlib import Path

__all__ = ["DIRTY", "REPOSITORY", "DirtyTreeError", "commit", "require_clean", "result_file"]

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path("bench/results")
DIRTY = "-dirty"
UNVERSIONED = "unversioned" + DIRTY


class DirtyTreeError(Exception):
    """Figures of code that no commit holds."""


def commit(repository: Path = REPOSITORY) -> str:
    """The full id of HEAD, with DIRTY behind it where a file differs; results do not count.

    Files that no git knows, as in an unpacked archive, are UNVERSIONED.
    """
    try:
        changes = _git(repository, "status", "--porcelain", "--", ".", f":!{RESULTS}")
        return _git(repository, "rev-parse", "HEAD") + (DIRTY if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return UNVERSIONED


def require_clean(commit_id: str) -> str:
    """commit_id, or DirtyTreeError where it is marked as dirty."""
    if commit_id.endswith(DIRTY):
        raise DirtyTreeError(
            f"{commit_id}: results are kept of committed code only; commit or remove the changes"
        )
    return commit_id


def result_file(commit_id: str, gpu: str | None, repository: Path = REPOSITORY) -> Path:
    """bench/results/<gpu>/<commit>.json; without a GPU under cpu."""
    folder = gpu.lower().replace(" ", "-") if gpu else "cpu"
    return repository / RESULTS / folder / f"{require_clean(commit_id)[:10]}.json"


def _git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", repository, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
