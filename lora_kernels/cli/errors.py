"""Errors that the user can fix; every other exception is a bug of this program."""

__all__ = ["UsageError"]


class UsageError(Exception):
    """A bad argument, file or option, described in one line; the command ends with exit code 2."""
