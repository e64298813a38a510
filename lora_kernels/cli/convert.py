"""lora-kernels convert: an adapter from loralib's file to PEFT's directory, or back."""

import argparse
from pathlib import Path

from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.to_loralib import to_loralib
from lora_kernels.cli.to_peft import to_peft

__all__ = ["convert"]


def convert(options: argparse.Namespace) -> list[str]:
    """Does what the command line asks for; lines that say what was done.

    Raises: UsageError, in one line, for all that cannot be read, converted or written.
    """
    source, destination = Path(options.source), Path(options.destination)
    if not source.exists():
        raise UsageError(f"convert: {source}: no such file or directory")
    try:
        if source.is_dir():
            return to_loralib(source, destination)
        return to_peft(source, destination, options)
    except (ValueError, OSError) as error:
        raise UsageError(f"convert: {' '.join(str(error).split())}") from error
