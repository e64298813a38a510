"""What the user has to put right; every other exception is a fault of the program."""


class InputError(Exception):
    """A bad file, option or model, told in one line; the program ends with exit code 2."""
