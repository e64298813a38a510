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

    recognises: whether what is at a path looks like it. read: an Adapter out of it, with what the
    user has to add. write: puts an Adapter there; lines that say what has been written.
    Raises: ValueError and OSError, out of read and write, for what cannot be read, expressed or
    written; the file and the place in it are named.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Hints], Adapter]
    write: Callable[[Adapter, Path], list[str]]


# The first that recognises a path reads it.
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
