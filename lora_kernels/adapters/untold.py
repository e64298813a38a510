"""What the files of an adapter do not tell: one error that has all of it, and the options."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lora_kernels.adapters.formats.adapter import Adapter, Hints

    _Read = Callable[[Path, Hints], Adapter]

__all__ = ["ALPHA", "Untold", "telling_all"]

ALPHA = "--lora-alpha ALPHA"  # the one option that is an argument of load_adapter as well


class Untold(ValueError):
    """A file does not tell something that an option of ``lora-kernels convert`` does.

    what: in words. options: with an example of their values; none if none helps. assumed: fields of
    Hints under which reading can go on, to find what else is not told; None if there are none.
    """

    def __init__(self, what: str, *options: str, assumed: dict[str, Any] | None = None):
        self.what, self.options, self.assumed = what, options, assumed
        super().__init__(f"{what}: give {' '.join(options)}" if options else what)

    def at(self, place) -> "Untold":
        """The same error, with the file, or the place in it, in front."""
        return Untold(f"{place}: {self.what}", *self.options, assumed=self.assumed)


def telling_all(read: "_Read") -> "_Read":
    """read, which raises Untold for the first thing; now one Untold for all of them."""

    def read_or_tell_all(file: "Path", hints: "Hints") -> "Adapter":
        lacks: list[Untold] = []
        while True:
            try:
                adapter = read(file, hints)
            except Untold as error:
                lacks.append(error)
                if error.assumed is None:
                    break
                hints = replace(hints, **error.assumed)
            except ValueError:
                if not lacks:
                    raise
                break
            else:
                if not lacks:
                    return adapter
                break
        first, *others = lacks
        what = "; ".join([first.what, *(each.what.removeprefix(f"{file}: ") for each in others)])
        options = dict.fromkeys(option for each in lacks for option in each.options)
        raise Untold(what, *options)

    return read_or_tell_all
