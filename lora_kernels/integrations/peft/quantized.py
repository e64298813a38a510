"""PEFT's LoRA layers over quantised bases: which classes there are, and when they come to be.

PEFT defines a class for each quantiser in a module of its own, some of them only once a model needs
it. A class is known by its name and the source of its forward.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lora_kernels.foreign import ForeignModule
from lora_kernels.integrations.peft.source import digest

__all__ = ["classes_below", "is_known", "is_quantised", "watch_classes"]

# sha256 of the source of each class's forward in the versions that the guard is written for.
_KNOWN_FORWARDS = {
    "peft.tuners.lora.bnb.Linear4bit": (
        "8877e8157be4901a6d051dae6bf12cdb6c44537eda1e2a37c7f17e6978169931",  # 0.16.0 to 0.17.1
        "ba53967c7f8574384a160a6a897e8ec6205718e9bfef9d6998cb40cb8bcf6eb8",  # 0.18.0 to 0.21.2
    ),
    "peft.tuners.lora.bnb.Linear8bitLt": (
        "f788b26ddea8f60bbc8d56c2b50597929b475b1f07210b5e3de7209c24371b0c",  # 0.16.0 to 0.17.1
        "0b619a1801a7bd5794a956d0d7825fb526dd6592c8bf8c7afe765c91138a2a2d",  # 0.18.0 to 0.21.2
    ),
    "peft.tuners.lora.hqq.HqqLoraLinear": (
        "18563b5b781c45a1fec28ee4b894d4026c3b2c1127e5e5079a16d020c171e50a",  # 0.16.0 to 0.21.2
    ),
    "peft.tuners.lora.gptq.GPTQLoraLinear": (
        "9551fc67c057875851618c2764e4a1f8fdc9ad9803dd49264fd3e7fdd873718c",  # 0.16.0 to 0.21.2
    ),
}


def is_quantised(kind: type) -> bool:
    """Whether kind is one of PEFT's classes over quantised bases that has a forward of its own."""
    return f"{kind.__module__}.{kind.__qualname__}" in _KNOWN_FORWARDS


def is_known(kind: type[nn.Module], forward: Callable) -> bool:
    """Whether forward is what kind had in a version that the guard is written for."""
    return digest(forward) in _KNOWN_FORWARDS[f"{kind.__module__}.{kind.__qualname__}"]


def classes_below(base: type[ForeignModule]) -> Iterator[type]:
    """The classes over quantised bases that derive from PEFT's LoraLayer and exist now."""
    for kind in base.__subclasses__():
        if is_quantised(kind):
            yield kind
        yield from classes_below(kind)


def watch_classes(base: Any, arrive: Callable[[type], None]) -> Callable[[], None]:
    """Calls arrive for each such class that is defined from now on; what is returned ends that."""

    before = vars(base).get("__init_subclass__")

    def notice(cls, **kwargs):
        own = super(base, cls).__init_subclass__ if before is None else before.__get__(None, cls)
        own(**kwargs)
        if is_quantised(cls):
            arrive(cls)

    def end():
        if before is None:
            del base.__init_subclass__
        else:
            base.__init_subclass__ = before

    base.__init_subclass__ = classmethod(notice)
    return end
