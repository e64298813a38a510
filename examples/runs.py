"""The folder of a run: what it is a run of, whether it may be written to, and how it ended."""

import contextlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from examples.errors import InputError
from examples.record import differences

__all__ = [
    "RECORD", "RESULTS", "check", "has_ended", "made", "read_json", "reported", "versions",
    "write_json",
]  # fmt: skip

RECORD, RESULTS = "run.json", "results.json"
PACKAGES = ("torch", "transformers", "accelerate")


def made(output: Path) -> Path:
    """output, which is a directory now. Raises: InputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be made: {error.strerror}") from None
    return output


def check(
    output: Path,
    this: Mapping,
    left: Sequence[Path],
    resume: bool,
    flat: Callable[[Mapping], Mapping] = dict,
) -> bool:
    """Whether output holds the run this, and it is to be resumed.

    this: what decides the run's outcome. left: files of a run that are there; none may be lost.
    flat: of records, how their differences are named.
    Raises: InputError if there is a run, and it is another one, or not to be resumed.
    """
    other = read_json(output / RECORD)
    # A run that left nothing is no loss, but not to be resumed as another either.
    if not left and not (resume and other):
        return False
    if other is None:
        raise InputError(
            f"--output {output}: holds a run, and no {RECORD} that says which: another folder "
            "starts anew"
        )
    differing = differences(flat(other), flat(this))
    if differing:
        raise InputError(
            f"--output {output}: holds another run: {'; '.join(differing)}: another folder starts "
            "anew"
        )
    if not resume:
        what = "tells its results" if has_ended(output) else "goes on with it"
        raise InputError(
            f"--output {output}: holds this run: --resume {what}, another folder starts anew"
        )
    return True


def has_ended(output: Path) -> dict | None:
    """What results.json says of a run that came to its end; None for any other."""
    results = read_json(output / RESULTS)
    return results if results is not None and results.get("status") == "complete" else None


@contextlib.contextmanager
def reported(
    path: Path, record: Mapping, writes: Callable[[], bool] = lambda: True
) -> Iterator[dict]:
    """What the block adds to the record is written to path when it ends, however it ends.

    status: "complete", "interrupted", or "failed", then with the reason in error.
    writes(): asked at the end, for processes that leave it to others, and runs that did not begin.
    """
    results = {**record, "status": "running"}
    try:
        yield results
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        results["status"] = "interrupted" if interrupted else "failed"
        if not interrupted:
            results["error"] = " ".join(str(error).split()) or type(error).__name__
        raise
    else:
        if results["status"] == "running":
            results["status"] = "complete"
    finally:
        if writes():
            write_json(results, path)


def read_json(path: Path) -> dict | None:
    """None if there is no object to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(content: Mapping, path: Path) -> None:
    """Losses that are no numbers, as of a run that has diverged, are null: JSON has no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a run's figures depend on; None if one is not installed."""
    import lora_kernels  # its own word: from a clone it need not be installed

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "lora_kernels": lora_kernels.__version__}
