"""What transformers loads by name or path, quietly, and with errors in one line."""

from transformers import logging

from examples.errors import InputError

__all__ = ["from_pretrained"]

# The table of new weights and the loading bar say nothing that the reports do not.
logging.set_verbosity_error()
logging.disable_progress_bar()


def from_pretrained(kind, location: str, **kwargs):
    """kind.from_pretrained(location, **kwargs), or an InputError that names --model."""
    try:
        return kind.from_pretrained(location, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"--model {location}: {reason}") from None
