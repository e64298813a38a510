"""What transformers loads by name or path, quietly, and with errors in one line."""

import sys
from collections.abc import Callable, Collection

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import logging

from examples.errors import InputError

__all__ = ["from_pretrained", "whole_model"]

# The table of new weights and the loading bar say nothing that the reports do not.
logging.set_verbosity_error()
logging.disable_progress_bar()

# What transformers raises for a name or files at fault; ImportError where one needs a package.
FAULTS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError)


def from_pretrained(kind, location: str, flag: str = "--model", **kwargs):
    """kind.from_pretrained(location, **kwargs), or an InputError that names the flag."""
    try:
        return kind.from_pretrained(location, **kwargs)
    except FAULTS as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise InputError(f"{flag} {location}: {reason}") from None


def whole_model(
    kind, location: str, head: Callable[[nn.Module], Collection[str]] = lambda model: (), **kwargs
) -> nn.Module:
    """kind's model in float32; of what its files lack, transformers draws the head alone.

    head(model): paths of the modules that may be new, or, with a line that says so, give way to
    others of another shape.
    Raises: InputError where the files lack any other weight or have it in another shape.
    """
    model, found = from_pretrained(
        kind, location, output_loading_info=True, ignore_mismatched_sizes=True,
        dtype=torch.float32, **kwargs,
    )  # fmt: skip
    new = tuple(f"{name}." for name in head(model))
    replaced = sorted(key for key, *_ in found["mismatched_keys"])
    drawn = {*found["missing_keys"], *replaced}
    body = sorted(key for key in drawn if not key.startswith(new))
    if body:
        raise InputError(
            f"--model {location}: {len(body)} weights of a {type(model).__name__} are not in it "
            f"or have another shape, the first is {body[0]}"
        )
    if replaced:
        print(
            f"--model {location}: drawn anew, since it has another shape: {', '.join(replaced)}",
            file=sys.stderr,
        )
    return model
