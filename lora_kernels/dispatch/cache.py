"""What was checked and measured on this machine's GPU: files of JSON in the user's cache directory.

A file holds for one GPU, driver, triton, torch and state of the kernels; any other is not read. It
is written beside its place and then moved there, so a reader sees it whole or not at all.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_kernels import environment

__all__ = [
    "BusyError", "clear", "directory", "exclusive", "files", "ignored", "machine", "parse",
    "path_of", "read", "write",
]  # fmt: skip

FORMAT = 1
_VARIABLE = "LORA_KERNELS_CACHE"


class BusyError(Exception):
    """Another process holds what exclusive() asks for."""


def directory() -> Path:
    """$LORA_KERNELS_CACHE; if that is not set, lora_kernels in $XDG_CACHE_HOME or ~/.cache.

    A user without a home, as in some containers, has none: it is one that cannot be made.
    """
    asked = os.environ.get(_VARIABLE)
    if asked:
        return Path(os.path.expanduser(asked))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # it would be a directory of this name, where the process runs
        home = os.devnull
    return Path(home) / "lora_kernels"


def path_of(kind: str, device: torch.device) -> Path:
    """The file of a kind of content, such as "checked" or "tuned", for a device."""
    its = machine(device)
    words = [kind, its["gpu"], f"{its['multiprocessors']}sm", its["triton"]]
    return directory() / f"{re.sub('[^a-z0-9.]+', '-', '-'.join(map(str, words)).lower())}.json"


@functools.cache
def machine(device: torch.device) -> dict[str, str | int | None]:
    """What a file holds for. In the interpreter there is no GPU, and nothing of a driver.

    Do not change the result.
    """
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    its = {"triton": triton, "torch": torch.__version__, "kernels": _digest()}
    if device.type != "cuda":
        return {"gpu": "interpreter", "capability": None, "multiprocessors": 0, "driver": 0, **its}
    properties = torch.cuda.get_device_properties(device)
    hip = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    return {
        "gpu": properties.name,
        "capability": hip or f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        **its,
    }


def read(kind: str, device: torch.device) -> dict:
    """The content of a file; {} if there is none that holds here.

    Warns, in one line, of one that is damaged or of another driver, version or format.
    """
    if not files(kind):
        return {}
    path = path_of(kind, device)
    try:
        its, content = parse(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        return ignored(path, f"it cannot be read: {' '.join(str(error).split())}")
    except ValueError as error:
        return ignored(path, str(error))
    for name, value in machine(device).items():
        if its.get(name) != value:
            return ignored(path, f"it is of {name} {its.get(name)}, this is {name} {value}")
    return content


def parse(path: Path) -> tuple[dict, dict]:
    """What a file holds for, and its content.

    Raises: ValueError that says in one line what is wrong with it; OSError.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not a file of format {FORMAT}")
    its, content = found.get("machine"), found.get("content")
    if not isinstance(its, dict) or not isinstance(content, dict):
        raise ValueError("it does not say what it holds for")
    return its, content


def write(kind: str, device: torch.device, content: dict) -> Path:
    """Puts content, which JSON can hold, in place of the file's, and returns its path.

    Raises: OSError if the directory cannot be made or written. If the user has asked for it, a
    warning says so as well, once: who keeps what saves time goes on without it.
    """
    path = path_of(kind, device)
    text = json.dumps({"format": FORMAT, "machine": machine(device), "content": content}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        if asked := os.environ.get(_VARIABLE):
            environment.warn_once(
                f"{_VARIABLE} must be a directory that can be written, got {asked!r}: "
                f"{error.strerror}"
            )
        raise
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return path


def files(kind: str) -> list[Path]:
    """The files of a kind, of every GPU and version; none of a directory that cannot be read."""
    try:
        return sorted(directory().glob(f"{kind}-*.json"))
    except OSError:
        return []


def clear(kind: str, device: torch.device | None) -> list[Path]:
    """Removes a device's file of a kind, or those of every GPU and version if device is None.

    Returns the paths of what was there. Raises: OSError if one cannot be removed.
    """
    its = None if device is None else path_of(kind, device)
    found = [path for path in files(kind) if its in (None, path)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def exclusive(kind: str) -> Iterator[None]:
    """Only one process at a time is inside, as far as the system has locks of files.

    Raises: BusyError that names the other process; OSError if the directory cannot be written.
    """
    directory().mkdir(parents=True, exist_ok=True)
    path = directory() / f"{kind}.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(f"process {file.read().strip() or 'unknown'} holds {path}") from None
        except OSError:  # a file system without locks, as some clusters have
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def ignored(path: Path, why: str) -> dict:
    """Warns once that a file is ignored, and why, in one line; returns what it is taken for: {}."""
    environment.warn_once(f"lora_kernels: {path} is ignored: {why}", stacklevel=4)
    return {}


def _driver() -> int:
    """The version of CUDA that the driver has, as PyTorch knows it; 0 if it does not."""
    try:
        # Of a build with CUDA; PyTorch's types do not know it.
        return torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return 0


@functools.cache
def _digest() -> str:
    """Of the kernels' source: a verdict on other code says nothing about these."""
    files = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
