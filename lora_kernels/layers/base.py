"""What every LoRA layer shares: hyperparameters, lora_A and lora_B, wrapping, state dicts.

A layer is the mixin :class:`LoRALayer` in front of a torch module, as in
``class LoRALinear(LoRALayer, nn.Linear)``. A subclass says where its base weight is
(``weight_name``) and what the update adds to it (``delta_weight``); merging.py does the rest.
"""

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.layers.merging import MergesOnEval

__all__ = ["LoRALayer"]


class LoRALayer(MergesOnEval):
    """Mixin of all LoRA layers; loralib's class of the same name.

    Attributes: ``r``, ``lora_alpha``, ``lora_dropout`` (an nn.Dropout), ``merge_weights``,
    ``merged``, and, if r > 0, ``scaling`` = lora_alpha / r.

    Merging. ``eval()`` adds the delta to the base weight in place if ``merge_weights`` is set;
    ``train()`` restores the base bit for bit from a copy that is kept in host memory meanwhile.
    While merged:

    * the forward is the plain layer's, so ``lora_A`` and ``lora_B`` receive no gradient
      (``merge_weights=False`` trains in eval mode);
    * ``state_dict()`` still holds the unmerged weight, and loading one takes effect at once;
    * edits of ``lora_A``, ``lora_B`` or ``scaling`` that autograd can see take effect at the next
      forward. Edits through ``.data``, and edits under a compiled forward, take effect at the
      next ``eval()``;
    * the base weight itself may be changed by ``load_state_dict`` only: ``train()`` undoes any
      other change.

    A weight that another module holds too is never merged in place: ``merged`` stays False and
    the forward adds the delta on the fly. The same holds for a weight that FSDP2 (``fully_shard``)
    has sharded. A layer that was merged before its weight was sharded raises a RuntimeError at its
    next forward.

    Raises: ValueError for a bad r, lora_alpha or lora_dropout.
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        layer = type(self).__name__
        self.r = check_rank(r, layer)
        self.lora_alpha = check_alpha(lora_alpha, layer)
        self.lora_dropout = nn.Dropout(check_dropout(lora_dropout, layer))
        self.merge_weights = merge_weights
        self.merged = False
        if self.r > 0:
            self.scaling = self.lora_alpha / self.r
        if isinstance(self, nn.Module):
            self.register_load_state_dict_post_hook(_remerge_after_load)

    # ---- what a subclass provides ----

    def delta_weight(self) -> Tensor:
        """What the update adds to the base weight, scaled, in its layout, in float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta_weight")

    def reset_lora_parameters(self) -> None:
        """Draws lora_A and lora_B anew; does nothing to a layer without them."""
        raise NotImplementedError(f"{type(self).__name__} does not define reset_lora_parameters")

    # ---- the adapter ----

    @property
    def has_lora(self) -> bool:
        """Whether the layer holds lora_A and lora_B."""
        return hasattr(self, "lora_A")  # also of parametrized, pruned and replicated layers

    def active_dropout_p(self) -> float:
        """p of lora_dropout now: 0 if it is in eval mode or is not a dropout at all."""
        dropout = self.lora_dropout
        return getattr(dropout, "p", 0.0) if dropout.training else 0.0

    def _add_adapter(self, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        """Gives the layer lora_A and lora_B of these shapes and freezes its base weight."""
        weight = self._weight()
        self.lora_A = nn.Parameter(weight.new_zeros(a_shape))
        self.lora_B = nn.Parameter(weight.new_zeros(b_shape))
        weight.requires_grad = False

    def _factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, gathered from all ranks if they are sharded."""
        return distributed.full_tensor(self.lora_A), distributed.full_tensor(self.lora_B)

    def _adopt(self, wrapped: nn.Module, lora_dtype: torch.dtype | None) -> "LoRALayer":
        """Takes over the parameters and the mode of a plain module, and draws a new adapter."""
        owner, weight = self.weight_owner(), wrapped.weight
        owner.weight = weight
        if getattr(wrapped, "bias", None) is not None:
            owner.bias = wrapped.bias
        if self.has_lora:
            weight.requires_grad = False
            dtype = weight.dtype if lora_dtype is None else lora_dtype
            for name in ("lora_A", "lora_B"):
                empty = torch.empty(getattr(self, name).shape, dtype=dtype, device=weight.device)
                setattr(self, name, nn.Parameter(empty))
            self.reset_lora_parameters()
        return self.train(wrapped.training)

    # ---- state dicts ----

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The module's state dict, with the unmerged weight in both modes."""
        destination = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if self._base_weight is not None:
            destination[prefix + self.weight_name] = self._base_weight
        return destination

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The layer is loaded unmerged. _remerge_after_load merges it again when its children have
        # been loaded too.
        self._remerge = self.merged
        if self.merged:
            self._restore()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _remerge_after_load(layer: LoRALayer, incompatible_keys) -> None:
    if layer.__dict__.pop("_remerge", False):
        layer._merge()
