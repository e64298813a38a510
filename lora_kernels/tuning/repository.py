"""The commit that is measured; figures are only kept of one that is committed."""

import subprocess
from pathlib import Path

__all__ = [
    "DIRTY", "REPOSITORY", "RESULTS", "DirtyTreeError", "commit", "git", "require_clean",
    "result_file",
]  # fmt: skip

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path("bench/results")
DIRTY = "-dirty"
UNVERSIONED = "unversioned" + DIRTY


class DirtyTreeError(Exception):
    """Figures of code that no commit holds."""


def commit(repository: Path = REPOSITORY) -> str:
    """The full id of HEAD, with DIRTY behind it if a file differs; results do not count.

    Files that are not the root of a repository, as in an unpacked archive or an installed package,
    are UNVERSIONED.
    """
    if not (repository / ".git").exists():
        return UNVERSIONED
    try:
        changes = git("status", "--porcelain", "--", ".", f":!{RESULTS}", repository=repository)
        return git("rev-parse", "HEAD", repository=repository) + (DIRTY if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return UNVERSIONED


def require_clean(commit_id: str) -> str:
    """commit_id, or DirtyTreeError if it is marked as dirty."""
    if commit_id.endswith(DIRTY):
        raise DirtyTreeError(
            f"{commit_id}: results are kept of committed code only; commit or remove the changes"
        )
    return commit_id


def result_file(commit_id: str, gpu: str | None, repository: Path = REPOSITORY) -> Path:
    """bench/results/<gpu>/<commit>.json; without a GPU under cpu."""
    folder = gpu.lower().replace(" ", "-") if gpu else "cpu"
    return repository / RESULTS / folder / f"{require_clean(commit_id)[:10]}.json"


def git(*arguments: str, repository: Path = REPOSITORY) -> str:
    """What a command of git prints. Raises: OSError, subprocess.CalledProcessError."""
    done = subprocess.run(
        ["git", "-C", repository, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
