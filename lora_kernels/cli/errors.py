"""Errors that the user can fix; every other exception is a bug of this program."""

import contextlib
from collections.abc import Iterator

__all__ = ["UsageError", "of_files", "of_gpu"]


class UsageError(Exception):
    """A bad argument, file or option, described in one line; the command ends with exit code 2."""


@contextlib.contextmanager
def of_gpu(command: str) -> Iterator[None]:
    """What a GPU that does not answer raises within is a UsageError."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(
            f"{command}: the GPU cannot be used ({' '.join(str(error).split())}): see what "
            f"nvidia-smi says of it"
        ) from error


@contextlib.contextmanager
def of_files(command: str, way_out: str) -> Iterator[None]:
    """An OSError within is a UsageError that names the file; not if the reader of stdout ended."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UsageError(f"{command}: {where}{error.strerror or error}: {way_out}") from error
