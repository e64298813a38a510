"""lora-kernels convert: an adapter from one file format to another."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from lora_kernels.adapters import formats, hub
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.base import Base
from lora_kernels.adapters.formats.loralib_merged import unmerge
from lora_kernels.adapters.formats.plain import summary
from lora_kernels.cli.errors import UsageError

__all__ = ["convert", "hints_of", "main"]

# Formats that are one file; loralib's is called as torch.save's files are.
_ONE_FILE, _PICKLES = ("loralib", "kohya", "gguf"), (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_OWN_WORDS = {"peft", "loralib"}  # between these two, what they write says it all


def main(options: argparse.Namespace) -> int:
    """Converts, and prints what was done."""
    for line in convert(options):
        print(line)
    return 0


def convert(options: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; returns lines that say what was done.

    Without --to, PEFT's directory becomes loralib's file (.pt), or GGUF (.gguf), as DESTINATION is
    called. Every other format becomes PEFT's directory. With --merged a state dict with merged
    weights becomes one with base weights.
    Raises: UsageError, in one line, for all that cannot be read, converted or written.
    """
    destination = Path(options.destination)
    try:
        source = hub.path_of(options.source, "SOURCE")
        hints = hints_of(options)
        if options.merged:
            _check_file(options.destination)
            _check_new(destination)
            return unmerge(source, destination, hints)
        found, file = formats.locate(source, options.source_format)
        wanted = options.to or _default(found, destination)
        if wanted in _ONE_FILE:
            _check_file(options.destination)
        adapter = formats.FORMATS[found].read(file, hints)
        if destination.is_dir() and any(destination.iterdir()):
            raise ValueError(f"{destination}: is a directory that is not empty")
        _check_new(destination)
        written = formats.FORMATS[wanted].write(adapter, destination, hints)
        taken = []
        if not {found, wanted} <= _OWN_WORDS:
            taken = [f"{file}: taken for {found}:", *summary(adapter)]
        return [*taken, *written, *adapter.notes]
    except (ValueError, OSError) as error:
        raise UsageError(f"convert: {' '.join(str(error).split())}") from error


def _check_new(destination: Path) -> None:
    """Raises: ValueError for a file that is there already, or a link to nothing."""
    if os.path.lexists(destination) and not destination.is_dir():
        raise ValueError(f"{destination}: is there already")


def _check_file(destination: str) -> None:
    """Raises: ValueError for what is written as a directory."""
    if destination.endswith(("/", os.sep)):
        raise ValueError(
            f"{destination}: is written as a directory, and a file is to be made: give its name, "
            f"such as {destination.rstrip('/' + os.sep)}.pt, or the format of a directory by --to"
        )


def _default(found: str, destination: Path) -> str:
    """The format that DESTINATION is to have if --to does not say it."""
    if destination.suffix == ".gguf":
        return "gguf"
    if found != "peft":
        return "peft"
    if destination.suffix == ".safetensors":
        raise ValueError(f"{destination}: loralib's file is a pickle: call it .pt, or give --to")
    if destination.suffix not in _PICKLES and not destination.is_dir():
        raise ValueError(
            f"{destination}: PEFT's directory becomes loralib's file or GGUF: call it .pt (or "
            f"{', '.join(_PICKLES[1:])}) or .gguf, or give --to FORMAT"
        )
    return "loralib"


def hints_of(options: argparse.Namespace) -> Hints:
    """What the options say that files lack. Raises: ValueError, OSError."""
    return Hints(
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        fan_in_fan_out=options.fan_in_fan_out,
        enable_lora=tuple(_numbers("--enable-lora", options.enable_lora)),
        out_splits=tuple(_numbers("--out-splits", options.out_splits)),
        embedding=tuple(options.embedding),
        modules_to_save=tuple(options.modules_to_save),
        drop_prefix=options.drop_prefix,
        **({} if options.base is None else {"base": Base.read(Path(options.base))}),
    )


def _numbers(option: str, values: Iterable[str]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name (or "") and numbers of each [NAME=]N,N,... that an option was given."""
    for value in values:
        name, _, numbers = value.rpartition("=")
        try:
            yield name, tuple(int(number) for number in numbers.split(","))
        except ValueError:
            raise ValueError(f"{option}: must be [NAME=]N,N,..., got {value!r}") from None
