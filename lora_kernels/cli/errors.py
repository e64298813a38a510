"""What the user has to put right; every other exception is a fault of the program."""

__all__ = ["UsageError"]


class UsageError(Exception):
    """A bad argument, file or option, told in one line; the command ends with exit code 2."""
