"""Tensors of large files: mapped, checked and written piece by piece, in little memory."""

import contextlib
import ctypes
import json
import math
import mmap
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

__all__ = [
    "Releasing",
    "adopt",
    "is_finite",
    "map_pickle",
    "map_safetensors",
    "release",
    "write_safetensors",
]

# What safetensors calls the dtypes; of others its own reader makes tensors.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 20  # numbers that are checked or written at once
_UNRELEASED = 1 << 24  # bytes that are written before pages are given back

_open: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def release() -> None:
    """Gives back the memory of what was read of mapped files; it is read again if it is used."""
    for mapping in list(_open):
        with contextlib.suppress(AttributeError, OSError):  # not every system can
            mapping.madvise(mmap.MADV_DONTNEED)


def adopt(mapping: mmap.mmap) -> None:
    """Has release() give back what is read of a private mapping that another package has made."""
    _open.add(mapping)


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. The tensors are the file's pages: never write.

    Raises: what safetensors raises for a damaged file; OSError.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file, path.open("rb") as raw:
        metadata = file.metadata() or {}
        mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        adopt(mapping)
        start = 8 + int.from_bytes(mapping[:8], "little")
        header = json.loads(mapping[8:start])  # which safetensors has checked
        tensors = {}
        for key in file.keys():  # noqa: SIM118
            dtype, shape = _DTYPES.get(header[key]["dtype"]), header[key]["shape"]
            offset, count = start + header[key]["data_offsets"][0], math.prod(shape)
            if dtype is None or count == 0 or offset % dtype.itemsize:
                tensors[key] = file.get_tensor(key)
                continue
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
            tensors[key] = flat.view(shape)
    return tensors, metadata


def map_pickle(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """state, which torch.load has mapped from the file at path, over pages that release() knows.

    It is returned as it is if the file holds other tensors, too, or something is unexpected.
    """
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()
    }
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError):
        with path.open("rb") as raw:
            records = _records(raw)
            mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
        shift = min(storages) - min(records)
        if {pointer - shift: size for pointer, size in storages.items()} != records:
            return dict(state)
        again = {}
        for key, old in state.items():
            storage, dtype = old.untyped_storage(), old.dtype
            count, offset = storage.nbytes() // dtype.itemsize, storage.data_ptr() - shift
            flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
            again[key] = flat.as_strided(old.shape, old.stride(), old.storage_offset())
        ends = [[t.flatten()[i] for t in s.values() for i in (0, -1)] for s in (state, again)]
        if all(map(torch.equal, *ends)):
            adopt(mapping)
            return again
    return dict(state)


def _records(raw: BinaryIO) -> dict[int, int]:
    """Offset -> size of the storages in a file of torch.save, which stores them as they are."""
    found = {}
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size and info.compress_type == 0:
                raw.seek(info.header_offset + 26)  # lengths of the name and the rest of the header
                name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
                found[info.header_offset + 30 + name + extra] = info.file_size
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers holds neither NaN nor infinite ones."""
    for piece in _pieces(tensor.detach()):
        low, high = (piece.float() if piece.itemsize == 1 else piece).aminmax()  # not of float8
        if not (low.isfinite() and high.isfinite()):
            return False
    return True


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a new file of safetensors; tensors may be views, share memory and lie on a device."""
    # As safetensors has it, so that every tensor is aligned: wide dtypes first, then by key.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        value = tensors[key]
        if value.dtype not in _NAMES:
            raise ValueError(f"{key}: dtype {value.dtype} is not supported")
        start, end = end, end + value.numel() * value.dtype.itemsize
        header[key] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as raw:
        file = Releasing(raw)
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for piece in _pieces(tensors[key].detach()):
                piece = piece.cpu().contiguous()
                size = piece.numel() * piece.dtype.itemsize
                file.write((ctypes.c_char * size).from_address(piece.data_ptr()))


class Releasing:
    """A file that is written to, which gives the memory of mapped files back on the way."""

    def __init__(self, file: BinaryIO):
        self._file, self._written = file, 0

    def write(self, data) -> int:
        """Writes data; returns the number of bytes."""
        size = self._file.write(data)
        self._written += size
        if self._written >= _UNRELEASED:
            self._written = 0
            release()
        return size

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """tensor in parts of about _PIECE numbers that follow one another in memory order."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_PIECE)
    else:
        yield from tensor.split(max(1, _PIECE * tensor.shape[0] // tensor.numel()))
