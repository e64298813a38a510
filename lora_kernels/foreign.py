"""What is not this package's: PEFT's adapters in a model, arguments of another kind, and names that
are nearly right.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar, cast

from torch import nn

__all__ = [
    "ForeignModule", "Model", "check_keywords", "check_model", "check_no_peft", "check_options",
    "check_path", "did_you_mean", "importing", "named_by_layer", "peft_layer",
]  # fmt: skip

# A module of a class that is not imported here. Its attributes are of any type, while type checkers
# take those of an nn.Module for tensors or modules.
ForeignModule: TypeAlias = Any
# The model that a function takes and returns.
Model = TypeVar("Model", bound=nn.Module)
_Init = TypeVar("_Init", bound=Callable[..., None])

# What other libraries, or this one elsewhere, call an argument.
_ALIASES = {
    "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "lora_p": "lora_dropout", "p": "lora_dropout",
}  # fmt: skip


@contextlib.contextmanager
def importing(package: str, function: str) -> Iterator[None]:
    """The block imports package for function. Raises: ModuleNotFoundError that says how to get it.

    What package itself fails to import keeps its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not f"{error.name}.".startswith(f"{package}.") or sys.modules.get(package) is not None:
            raise
        told = f"{function}: needs {package}: pip install {package}"
        raise ModuleNotFoundError(told, name=package) from error


def peft_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the first layer of PEFT in model; None if there is none.

    Without an import: a model that holds one has imported PEFT.
    """
    module = sys.modules.get("peft.tuners.tuners_utils")
    kind = getattr(module, "BaseTunerLayer", None)
    if kind is None:
        return None
    return next((pair for pair in model.named_modules() if isinstance(pair[1], kind)), None)


def check_model(function: str, model: Any) -> None:
    """model, function's first argument, is a module. Raises: TypeError that names it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model, the first argument, must be an nn.Module, got {_shown(model)}"
        )


def check_no_peft(function: str, model: nn.Module, instead: str) -> None:
    """model holds no adapters of PEFT, on which function would do harm, or nothing.

    instead: what does for them what function does for this package's layers.
    Raises: TypeError; ValueError that names the first of PEFT's layers and says what to do.
    """
    check_model(function, model)
    found = peft_layer(model)
    if found is not None:
        path, layer = found
        raise ValueError(
            f"{function}: model holds adapters of PEFT ({path} is a {type(layer).__name__} of "
            f"PEFT): {instead}"
        )


def check_path(function: str, name: str, value: Any, instead: str = "") -> None:
    """value can be a path. instead: what takes other values. Raises: TypeError that names it."""
    if not isinstance(value, (str, os.PathLike)):
        way_out = f": {instead}" if instead else ""
        raise TypeError(f"{function}: {name} must be a path, got {_shown(value)}{way_out}")


def _shown(value: Any) -> str:
    """What value is, in a few words."""
    kind = type(value).__name__
    return f"{kind} {str(value)!r}" if isinstance(value, (str, os.PathLike)) else kind


def check_keywords(function: str, given: Collection[str], names: Collection[str]) -> None:
    """given, the keywords that function does not take, are none. Raises: TypeError, as below."""
    for name in given:
        meant = _ALIASES[name] if _ALIASES.get(name) in names else did_you_mean(name, names)
        raise TypeError(
            f"{function}: got an unexpected argument {name!r}"
            + (f": did you mean {meant}?" if meant else "")
        )


def check_options(layer: type, base: type[ForeignModule], options: Mapping[str, Any]) -> None:
    """The constructor of base takes all options that a layer's constructor passes on.

    Raises: TypeError that names the layer, the argument, and one with nearly its name.
    """
    taken = inspect.signature(base.__init__).parameters
    unknown = [name for name in options if name not in taken]
    if unknown:
        check_keywords(layer.__name__, unknown, [*taken, *_named(layer)])


def named_by_layer(init: _Init) -> _Init:
    """init of a layer, which names the layer, and what was meant, if an argument is missing.

    Python names the class that defines init. Raises: TypeError, also for a module as the first.
    """
    parameters = inspect.signature(init).parameters.values()
    _, *required = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_KEYWORD]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        layer = type(self)
        if args and isinstance(args[0], nn.Module):
            wraps = next(name for name in dir(layer) if name.startswith("from_"))
            raise TypeError(
                f"{layer.__name__}: {required[0]} must be an integer, got a "
                f"{type(args[0]).__name__}: {layer.__name__}.{wraps} wraps a module"
            )
        missing = [name for name in required[len(args) :] if name not in kwargs]
        if missing:
            check_keywords(layer.__name__, [k for k in kwargs if did_you_mean(k, missing)], missing)
            raise TypeError(f"{layer.__name__}: {', '.join(missing)} must be given")
        init(self, *args, **kwargs)

    return cast(_Init, checked)


def _named(layer: type) -> list[str]:
    """What the constructors of a layer name, as far as they pass on what they do not name."""
    names: list[str] = []
    for kind in layer.__mro__:
        if "__init__" in vars(kind):
            _, *parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
            names += [parameter.name for parameter in parameters]
    return names


def did_you_mean(name: str, names: Collection[str]) -> str | None:
    """The one of names that is most like name; None if none is."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)
