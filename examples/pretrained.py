"""What transformers loads by name or path, quietly, and with errors in one line."""

from safetensors import SafetensorError
from transformers import logging

from examples.errors import InputError

__all__ = ["from_pretrained"]

# The table of new weights and the loading bar say nothing that the reports do not.
logging.set_verbosity_error()
logging.disable_progress_bar()

# What transformers raises for a name or files at fault; ImportError where one needs a package.
FAULTS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError)


def from_pretrained(kind, location: str, **kwargs):
    """kind.from_pretrained(location, **kwargs), or an InputError that names --model."""
    try:
        return kind.from_pretrained(location, **kwargs)
    except FAULTS as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"--model {location}: {reason}") from None
