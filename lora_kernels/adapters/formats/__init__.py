"""File formats of adapters: each reads files into the neutral Adapter and writes one to files.

A new format is a file here and an entry of FORMAT_NAMES.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lora_kernels.adapters import files
from lora_kernels.adapters.agreement import check_agrees
from lora_kernels.adapters.format_names import FORMAT_NAMES
from lora_kernels.adapters.formats.adapter import Adapter, Hints
from lora_kernels.adapters.formats.contents import Contents, below, candidates, look
from lora_kernels.adapters.untold import telling_all

__all__ = ["FORMATS", "Format", "locate", "recognise"]


class Format(NamedTuple):
    """One file format.

    recognises: whether contents look like this format. read: makes an Adapter of the file of
    weights, or of a directory, with hints from the user. write: writes an Adapter to a path, with
    the hints' base model; returns lines that say what is written.
    Raises: read and write raise ValueError and OSError, which name the file and the place in it,
    for what cannot be read, expressed or written; read raises Untold, a ValueError, for all that
    hints lack, and ValueError for a hint that contradicts the file or that nothing in it takes.
    """

    recognises: Callable[[Contents], bool]
    read: Callable[[Path, Hints], Adapter]
    write: Callable[[Adapter, Path, Hints], list[str]]


def _format(name: str) -> Format:
    module = import_module(f"{__name__}.{name}")
    return Format(module.recognises, _agreeing(name, telling_all(module.read)), module.write)


def _agreeing(
    name: str, read: Callable[[Path, Hints], Adapter]
) -> Callable[[Path, Hints], Adapter]:
    """read, which passes over hints that it does not need; now it refuses those that differ."""

    def read_or_refuse(file: Path, hints: Hints) -> Adapter:
        adapter = read(file, hints)
        with files.naming(file):
            check_agrees(adapter, hints, _EXEMPT.get(name, ()))
        return adapter

    return read_or_refuse


_FOLDER = "adapter"  # in a checkpoint, see integrations/trainer.py
# Hints that a reader compares with the file itself: LitGPT's three projections are three layers.
_EXEMPT = {"loralib": ("drop_prefix",), "litgpt": ("enable_lora",)}
FORMATS = {name: _format(name) for name in FORMAT_NAMES}


def recognise(path: Path) -> str:
    """The name of the format of what is at path. Raises: as locate."""
    return locate(path)[0]


def locate(path: Path, wanted: str | None = None) -> tuple[str, Path]:
    """The format of the adapter at path, and the file of its weights, or its directory.

    wanted: the format, if the user has told it. A directory without an adapter that has one in its
    folder ``adapter``, as adapter_callback leaves it, stands for this one.
    Raises: ValueError if nothing there is in one of FORMATS, or in the one wanted, and if path is
    a directory with several adapters; OSError.
    """
    looks = [look(file) for file in candidates(path)] or [look(path)]
    found = []
    for contents in looks:
        name = next((name for name, form in FORMATS.items() if form.recognises(contents)), None)
        if name is not None and wanted in (None, name):
            found.append((name, contents.path))
        elif wanted is not None and FORMATS[wanted].recognises(contents):
            found.append((wanted, contents.path))
    if not found or (len(looks) == 1 and looks[0].kind == "directory"):
        folders = below(path)
        if path / _FOLDER in folders:
            return locate(path / _FOLDER, wanted)
        if folders:
            names = ", ".join(map(str, folders))
            raise ValueError(f"{path}: holds no adapter, but its folders do: {names}: give one")
    if not found:
        for contents in looks:
            if contents.kind == "safetensors" and not contents.keys:
                files.read_safetensors(contents.path)  # tells what is damaged
        known = ", ".join(FORMATS) if wanted is None else wanted
        raise ValueError(f"{path}: must be in one of these formats: {known}")
    if len(found) > 1:
        names = ", ".join(f"{file.name} ({name})" for name, file in found)
        raise ValueError(f"{path}: holds several adapters: {names}: give the path of one")
    return found[0]
