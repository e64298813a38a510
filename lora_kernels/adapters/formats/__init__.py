"""File formats of adapters: each reads files into the neutral Adapter and writes one to files.

A new format is a file here and an entry of FORMATS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_kernels.adapters.formats import loralib, peft
from lora_kernels.adapters.formats.adapter import Adapter, Hints

__all__ = ["FORMATS", "Format", "recognise"]


class Format(NamedTuple):
    """One file format.

    recognises: whether what is at a path looks like this format. read: makes an Adapter of it, with
    hints from the user. write: writes an Adapter to a path; returns lines that say what is written.
    Raises: read and write raise ValueError and OSError, which name the file and the place in it,
    for what cannot be read, expressed or written.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Hints], Adapter]
    write: Callable[[Adapter, Path], list[str]]


# The first format that recognises a path reads it.
FORMATS = {
    "peft": Format(peft.recognises, peft.read, peft.write),
    "loralib": Format(loralib.recognises, loralib.read, loralib.write),
}


def recognise(path: Path) -> str:
    """The name of the format of what is at path. Raises: ValueError if it has none of FORMATS."""
    for name, form in FORMATS.items():
        if form.recognises(path):
            return name
    raise ValueError(f"{path}: must be in one of these formats: {', '.join(FORMATS)}")
