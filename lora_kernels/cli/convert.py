"""lora-kernels convert: an adapter from one file format to another."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from lora_kernels.adapters import formats
from lora_kernels.adapters.formats.adapter import Hints
from lora_kernels.adapters.formats.loralib_merged import unmerge
from lora_kernels.cli.errors import UsageError

__all__ = ["convert"]


def convert(options: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; returns lines that say what was done.

    PEFT's directory becomes loralib's file. Every other format becomes PEFT's directory. With
    --merged a state dict with merged weights becomes one with base weights.
    Raises: UsageError, in one line, for all that cannot be read, converted or written.
    """
    source, destination = Path(options.source), Path(options.destination)
    if not source.exists():
        raise UsageError(f"convert: {source}: no such file or directory")
    try:
        if options.merged:
            return unmerge(source, destination, _hints(options))
        found = formats.recognise(source)
        wanted = "loralib" if found == "peft" else "peft"
        adapter = formats.FORMATS[found].read(source, _hints(options))
        return [*formats.FORMATS[wanted].write(adapter, destination), *adapter.notes]
    except (ValueError, OSError) as error:
        raise UsageError(f"convert: {' '.join(str(error).split())}") from error


def _hints(options: argparse.Namespace) -> Hints:
    return Hints(
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        fan_in_fan_out=options.fan_in_fan_out,
        enable_lora=tuple(_numbers("--enable-lora", options.enable_lora)),
        out_splits=tuple(_numbers("--out-splits", options.out_splits)),
        embedding=tuple(options.embedding),
        modules_to_save=tuple(options.modules_to_save),
        drop_prefix=options.drop_prefix,
    )


def _numbers(option: str, values: Iterable[str]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name (or "") and numbers of each [NAME=]N,N,... that an option was given."""
    for value in values:
        name, _, numbers = value.rpartition("=")
        try:
            yield name, tuple(int(number) for number in numbers.split(","))
        except ValueError:
            raise ValueError(f"{option}: must be [NAME=]N,N,..., got {value!r}") from None
