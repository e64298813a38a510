"""What patch_peft() did, said once: how many of PEFT's LoRA layers train on this package.

The layers of the first training step are counted as they are called. One line on stderr says the
result when the second step, or a recomputation, calls one of them again; or at the end of the
program. LORA_KERNELS_QUIET=1 says nothing, LORA_KERNELS_REPORT=1 prints report() of these layers
as well; of several processes the first one says it.
"""

import atexit
import logging
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_kernels.environment import is_on

__all__ = ["Census"]

_LOGGER = logging.getLogger("lora_kernels")
_MOST_REASONS = 3
_QUIET, _REPORT = "LORA_KERNELS_QUIET", "LORA_KERNELS_REPORT"


class Census:
    """The layers of one training step. is_open: whether it still counts; read in every call."""

    def __init__(self, why_not: Callable[[nn.Module], str | None]):
        """why_not: why a layer runs PEFT's own code; None if it does not."""
        self.is_open = is_on(_REPORT) or not is_on(_QUIET)
        self._why_not = why_not
        self._reasons: weakref.WeakKeyDictionary[nn.Module, str | None] = (
            weakref.WeakKeyDictionary()
        )
        self._backward_began = False
        self._at_exit: Callable[[], None] | None = None

    def note(self, layer: nn.Module, y: Tensor) -> None:
        """A layer has been called, with result y."""
        if not layer.training or not getattr(y, "requires_grad", False) or torch.jit.is_tracing():
            return
        if layer in self._reasons:
            if self._backward_began:
                self.close()
            return
        if not self._reasons and self._at_exit is None:
            self._at_exit = self.close
            atexit.register(self._at_exit)
        if not self._backward_began and y.grad_fn is not None:
            y.register_hook(self._begin)
        self._reasons[layer] = self._why_not(layer)

    def close(self) -> None:
        """Says what was counted, if anything was; once."""
        self.forget()
        if not self._reasons or os.environ.get("RANK", "0") != "0":
            return
        if not is_on(_QUIET):
            _say(self.sentence())
        if is_on(_REPORT):
            from lora_kernels.reporting import report_of_layers

            print(report_of_layers(list(self._reasons)), file=sys.stderr)

    def forget(self) -> None:
        """Counts no more, and says nothing."""
        self.is_open = False
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None

    def sentence(self) -> str:
        """How many layers run on this package, and why others do not."""
        reasons = Counter(self._reasons.values())
        total, ours = reasons.total(), reasons.pop(None, 0)
        said = [f"{number}: {reason}" for reason, number in reasons.most_common(_MOST_REASONS)]
        if len(reasons) > _MOST_REASONS:
            said.append("...; report(model) has all")
        others = f"; PEFT's own code runs {total - ours} ({'; '.join(said)})" if said else ""
        return f"lora_kernels: {ours} of {total} LoRA layers of PEFT train on lora_kernels{others}"

    def _begin(self, _: Tensor) -> None:
        self._backward_began = True


def _say(line: str) -> None:
    """By the logger if the program has set one up for such lines, else on stderr."""
    if _LOGGER.hasHandlers() and _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.info(line.removeprefix("lora_kernels: "))
    else:
        print(line, file=sys.stderr)
