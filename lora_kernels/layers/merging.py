"""The base weight of a layer, with the delta in it after eval() and without it after train()."""

import contextlib

import torch
from torch import Tensor, nn

from lora_kernels import checks, distributed
from lora_kernels.layers.tied_weights import is_tied

__all__ = ["MergesOnEval", "undisturbed"]


class MergesOnEval:
    """Mixin of LoRALayer: eval() merges, train() restores, a forward refreshes.

    A class that derives from it has ``has_lora``, ``lora_A``, ``lora_B``, ``scaling`` and
    ``delta_weight()``, and says with ``weight_name`` where its base weight is.
    """

    weight_name = "weight"  # the base weight's, among the layer's parameters
    merged: bool
    merge_weights: bool
    _base_weight: Tensor | None = None  # the unmerged weight while the parameter holds the sum
    _merged_from: tuple | None = None  # the state of the adapter that is in the sum

    # ---- the weights ----

    def weight_owner(self) -> nn.Module:
        """The module that holds the base weight and the bias: the layer, or one inside it."""
        path, _, _ = self.weight_name.rpartition(".")
        return self.get_submodule(path)

    def _weight(self) -> Tensor:
        """The base weight parameter, merged or not."""
        return self.weight_owner()._parameters["weight"]

    def base_weight(self) -> Tensor:
        """The unmerged base weight: the parameter itself, or its copy while merged."""
        return self._weight() if self._base_weight is None else self._base_weight

    def merged_weight(self) -> Tensor:
        """base + delta, rounded once to the weight's dtype. Not differentiable."""
        weight = self._weight()
        with undisturbed(weight):
            if not self.has_lora:
                return weight.detach().clone()
            base = self.base_weight().detach().to(weight.device)
            return (base + distributed.distribute_like(self.delta_weight(), base)).to(weight.dtype)

    # ---- when they change ----

    def train(self, mode: bool = True):
        """Merges if mode is False and ``merge_weights`` is set, restores the base otherwise."""
        super().train(mode)
        if self.merge_weights and not mode:
            self._merge()
        else:
            self._restore()
        return self

    def _merge(self) -> None:
        if self.merged:
            if self._base_weight is not None and is_tied(self.weight_owner()):
                self._restore()
            self._refresh()
            return
        if self.has_lora:
            if is_tied(self.weight_owner()):
                return
            weight = self._weight()
            with undisturbed(weight):
                host = weight.device if weight.is_meta else "cpu"
                self._base_weight = weight.detach().to(host, copy=True)
            self._write_merged()
        self.merged = True

    def _restore(self) -> None:
        """Gives the parameter the base back, bit for bit."""
        if self._base_weight is not None:
            owner = self.weight_owner()
            if distributed.is_managed(owner):
                owner.state_dict()  # shards it again before it is written to
            weight = self._weight()
            with undisturbed(weight):
                weight.copy_(distributed.distribute_like(self._base_weight, weight))
            self._base_weight = self._merged_from = None
        self.merged = False

    def _refresh(self) -> None:
        """While merged: merges again if lora_A, lora_B or scaling have changed since."""
        if self._base_weight is None or torch.compiler.is_compiling():
            return
        if getattr(self, "_is_replica", False):  # of nn.DataParallel: a copy of a merged layer
            return
        if self._adapter_state() != self._merged_from:
            if distributed.is_managed(self.weight_owner()):
                raise RuntimeError(
                    f"{checks.layer_name(self)}: eval() merged it before fully_shard sharded its "
                    f"weight: call train() on the model first"
                )
            self._write_merged()

    def _write_merged(self) -> None:
        weight = self._weight()
        with undisturbed(weight):
            weight.copy_(self.merged_weight())
        self._merged_from = self._adapter_state()

    def _adapter_state(self) -> tuple:
        a, b = self.lora_A, self.lora_B
        return id(a), _version(a), id(b), _version(b), self.scaling

    def _apply(self, fn, recurse=True):
        # The base is moved or cast and then merged again; a merged weight is never cast.
        merged = self.merged
        if merged:
            self._restore()
        try:
            return super()._apply(fn, recurse)
        finally:
            if merged:
                self._merge()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def undisturbed(weight: Tensor):
    """Arithmetic on weight without gradients, autocast, or the caller's inference_mode."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(weight.is_inference()))
        stack.enter_context(torch.no_grad())
        if weight.device.type != "meta":
            stack.enter_context(torch.autocast(weight.device.type, enabled=False))
        yield
