"""Files of adapters: checked when they are read, and replaced only by complete ones."""

import contextlib
import contextvars
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters import mapped
from lora_kernels.adapters.untold import Untold

__all__ = [
    "FLOATS", "check_finite", "is_safetensors", "naming", "read_json", "read_pickle",
    "read_safetensors", "read_state", "read_tensors", "replacing", "unchecked", "write_pickle",
]  # fmt: skip

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@contextlib.contextmanager
def naming(where) -> Iterator[None]:
    """Errors inside begin with where: the file, and the place in it."""
    try:
        yield
    except Untold as error:
        raise error.at(where) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_not_empty(path: Path) -> None:
    """Raises: ValueError for a file without a byte; OSError."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty")


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises: ValueError that names it, for other content."""
    _check_not_empty(path)
    with naming(path):
        return json.loads(path.read_text("utf-8"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; the tensors are mapped, so never write to them.

    Raises: ValueError for a damaged file and, naming the key, for a value that is not finite.
    """
    from safetensors import SafetensorError

    _check_not_empty(path)
    try:
        tensors, metadata = mapped.map_safetensors(path)
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {key}: dtype {tensor.dtype} is not supported")
    check_finite(path, tensors)
    return tensors, metadata


_checks_numbers = contextvars.ContextVar("checks_numbers", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """NaN and infinite values are no errors inside: for looking at files, not for using them."""
    token = _checks_numbers.set(False)
    try:
        yield
    finally:
        _checks_numbers.reset(token)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises: ValueError, naming file and key, for NaN and infinite values."""
    if not _checks_numbers.get():
        return
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not mapped.is_finite(tensor):
            raise ValueError(f"{path}: {key}: holds NaN or infinite values")
        mapped.release()


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, as long as it is tensors in plain containers; nothing is executed.

    Raises: ValueError for anything else, for a damaged file, and for one that would take far more
    memory than it has bytes.
    """
    _check_not_empty(path)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        is_zip = zipfile.is_zipfile(path)
        grown = _grown_record(path) if is_zip else None
        if grown is not None:
            raise zipfile.BadZipFile(f"{grown} is compressed, or larger than the file")
        if path.suffix == ".safetensors":  # by which torch.load would take it for such a file
            with path.open("rb") as file:
                loaded = torch.load(file, **options)
        else:
            loaded = torch.load(path, mmap=is_zip, **options)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors, or is damaged; a pickle can run code, so only "
            f"tensors are loaded from one"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        why = str(error) or type(error).__name__
        raise ValueError(f"{path}: torch.load cannot read it: {why}") from None
    _check_tensors(path, loaded)
    return loaded


def _grown_record(path: Path) -> str | None:
    """A record that is larger in memory than in the file, of which torch.save writes none."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                return info.filename
    return None


def _check_tensors(path: Path, loaded: Any) -> None:
    """Raises: ValueError, naming the key, for a tensor that is not one piece of the file at path.

    What follows takes dense tensors alone.
    """
    size, seen = path.stat().st_size, set()
    left = [("", loaded)]
    while left:
        key, value = left.pop()
        if isinstance(value, Tensor):
            plain = value.layout is torch.strided and value.device.type == "cpu"
            if not plain or value.is_quantized or value.is_nested:
                raise ValueError(f"{path}: {key}: must be a dense tensor with its own numbers")
            if value.numel() * value.itemsize > size:
                raise ValueError(f"{path}: {key}: {list(value.shape)} is larger than the file")
        elif id(value) not in seen:  # containers may hold themselves
            seen.add(id(value))
            if isinstance(value, dict):
                left += [(str(name), inner) for name, inner in value.items()]
            elif isinstance(value, (list, tuple)):
                left += [(key, inner) for inner in value]


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors does."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a pickled state dict. Raises: ValueError, OSError."""
    return read_safetensors(path)[0] if is_safetensors(path) else read_state(path)


def read_state(path: Path, envelope: str | None = None) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote, as it is or under the key envelope.

    Raises: ValueError, naming file and key, for all else, and for values that are not finite.
    """
    state = read_pickle(path)
    if isinstance(state, dict) and isinstance(state.get(envelope), dict):
        state = state[envelope]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: must hold a state dict, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key}: must be a tensor, got {type(value).__name__}")
    state = mapped.map_pickle(path, state)
    check_finite(path, state)
    return state


def write_pickle(path: Path, state: dict[str, Any], envelope: str | None = None) -> None:
    """Writes a new file by torch.save; of each tensor in state exactly its own numbers.

    envelope: the key that holds state in the file.
    """
    for key, value in state.items():
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            is_part = value.untyped_storage().nbytes() > value.numel() * value.dtype.itemsize
            state[key] = value.clone() if is_part else value
    with path.open("xb") as file:
        releasing = mapped.Releasing(file)  # torch.save asks for no more than write() and flush()
        torch.save({envelope: state} if envelope else state, releasing)  # type: ignore[arg-type]


@contextlib.contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Errors of the system inside are of the same class, and say that path cannot be written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        named = type(error)(f"{path}: cannot be written: {why}")
        named.errno = error.errno
        raise named from error


@contextlib.contextmanager
def replacing(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """Gives a folder to write files of these names in. Then they replace those in directory.

    They do so in this order. If an error ends the writing, directory is as it was; only of files
    that it had, those before the error are replaced.
    Raises: OSError that names directory, or the file if it is one.
    """
    place = directory / names[0] if len(names) == 1 else directory
    with _unwritten(place), _replacing(directory, names) as scratch:
        yield scratch


@contextlib.contextmanager
def _replacing(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".adapter-", dir=directory))
    added: list[Path] = []
    try:
        yield scratch
        for name in names:
            is_new = not os.path.lexists(directory / name)
            os.replace(scratch / name, directory / name)
            added += [directory / name] * is_new
        made = added = []
    finally:
        for path in added:
            path.unlink()
        shutil.rmtree(scratch)
        with contextlib.suppress(OSError):  # another process has put something there
            for path in made:
                path.rmdir()
