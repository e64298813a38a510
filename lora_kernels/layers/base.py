"""What every LoRA layer shares: hyperparameters, lora_A and lora_B, wrapping.

A layer is the mixin :class:`LoRALayer` in front of a torch module, as in
``class LoRALinear(LoRALayer, nn.Linear)``. A subclass says where its base weight is
(``weight_name``) and what the update adds to it (``delta_weight``); merging.py does the rest.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.checks import check_alpha, check_dropout, check_rank
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.merged_state_dict import STATE_DICT_VERSION, notice_merged_weight
from lora_kernels.layers.merging import MergesOnEval, undisturbed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LoRALayer"]


class _TakesX(Protocol):
    """What a call of a layer is for type checkers: nn.Module's takes anything."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LoRALayer(MergesOnEval):
    """Mixin of all LoRA layers; loralib's class of the same name.

    Attributes: ``r``, ``lora_alpha``, ``lora_dropout`` (an nn.Dropout), ``merge_weights``,
    ``merged``, and, if r > 0, ``scaling`` = lora_alpha / r.

    Merging. If ``merge_weights`` is set, ``eval()`` makes the merged weight, a tensor of the
    layer's own beside the base weight, and ``train()`` drops it. ``weight``, ``parameters()`` and
    ``state_dict()`` are the unmerged base in both modes, and no tensor that existed before is
    written to; ``merged_weight()`` gives a merged copy. While ``merged``:

    * the forward is the plain layer's with the merged weight, so ``lora_A`` and ``lora_B`` receive
      no gradient (``merge_weights=False`` trains in eval mode). If the base weight requires a
      gradient and gradients are enabled, the forward adds the update on the fly instead;
    * the layer takes memory on its device for one merged copy of its weight. Pass
      ``merge_weights=False`` if that is too much: the update is then computed on the fly;
    * changes of the base weight, ``lora_A``, ``lora_B`` and ``scaling`` take effect at the next
      forward if they are assignments or edits in place that autograd counts; loading a state dict
      and moving or casting the layer do, too. Edits in place under a compiled forward take effect
      at the next ``eval()``. Edits in place through ``.data``, which PyTorch does not count, take
      effect when ``train()`` has dropped the merged weight and ``eval()`` makes it anew;
    * copies and pickles leave the merged weight behind and make their own.

    The update is computed on the fly, and ``merged`` is False, if a layer is not to be merged: if
    its weights are on the meta device, sharded, parametrized, of another tensor class, or shared
    with other processes, or if its forward was replaced, as offloading does, or is a subclass's
    own. The same holds after something else than the layer has moved or replaced its weights, until
    the next ``eval()``.

    Loading. A state dict that does not come from a layer of this package may hold merged weights,
    as loralib saves them in eval mode; see ``use_merged_state_dicts``. If it is seen that it does,
    the base weight stays, with a warning.

    Raises: ValueError for a bad r, lora_alpha or lora_dropout.
    """

    _version = STATE_DICT_VERSION
    r: int
    lora_alpha: float
    scaling: float
    __call__: _TakesX

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
            self.register_load_state_dict_post_hook(_merge_after_load)

    # ---- what a subclass provides ----

    def delta_weight(self) -> Tensor:
        """What the update adds to the base weight, scaled, in its layout, in float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} does not define delta_weight")

    def reset_lora_parameters(self) -> None:
        """Draws lora_A and lora_B anew; does nothing to a layer without them."""
        raise NotImplementedError(f"{type(self).__name__} does not define reset_lora_parameters")

    # ---- a layer that loralib has pickled ----

    def __setstate__(self, state: dict) -> None:
        if not isinstance(self, nn.Module):
            self.__dict__.update(state)
            return
        super().__setstate__(state)
        if _merge_after_load not in self._load_state_dict_post_hooks.values():
            self._come_from_loralib()

    def _come_from_loralib(self) -> None:
        """Makes a layer of this package of what loralib's attributes say."""
        self.register_load_state_dict_post_hook(_merge_after_load)
        merged, self.merged = self.merged, False
        if merged and self.has_lora:  # the update is in the weight
            weight = self.base_weight()
            with undisturbed(weight):
                weight.sub_(self.delta_weight().to(weight.dtype))
        if self.merge_weights and not self.training:
            self._merge()

    # ---- factors that a library left undrawn ----

    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_drawn_by_transformers", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Set by Transformers' from_pretrained when it has drawn what no file held.

        It makes models on the meta device and knows base weights alone, so the factors hold what
        was in memory. Those that a file held are marked, and its guard on nn.init leaves them.
        """
        self.__dict__["_drawn_by_transformers"] = value
        if value and self.__dict__.pop("_undrawn", False):
            self.reset_lora_parameters()

    # ---- the adapter ----

    @property
    def has_lora(self) -> bool:
        """Whether the layer holds lora_A and lora_B."""
        # Parametrized, pruned and replicated layers have it as an attribute.
        return "lora_A" in self._parameters or hasattr(self, "lora_A")

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The names of the parameters that are its factors, if it holds them."""
        return "lora_A", "lora_B"

    def active_dropout_p(self) -> float:
        """p of lora_dropout now: 0 if it is in eval mode or is not a dropout at all."""
        dropout = self.lora_dropout
        return getattr(dropout, "p", 0.0) if dropout.training else 0.0

    def _add_adapter(self, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        """Gives the layer lora_A and lora_B of these shapes and freezes its base weight."""
        weight = self.base_weight()
        self.lora_A = nn.Parameter(weight.new_zeros(a_shape))
        self.lora_B = nn.Parameter(weight.new_zeros(b_shape))
        weight.requires_grad = False
        if weight.is_meta:
            self._undrawn = True

    def _apply(self, fn, recurse=True):
        self.__dict__.pop("_undrawn", None)  # to_empty() leaves drawing to its caller
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *args
    ):
        notice_merged_weight(self, state_dict, prefix, local_metadata, missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    def _factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, gathered from all ranks if they are sharded."""
        return distributed.full_tensor(self.lora_A), distributed.full_tensor(self.lora_B)

    def _adopt(self, wrapped: ForeignModule, lora_dtype: torch.dtype | None) -> "Self":
        """Takes over the parameters and the mode of a plain module, and draws a new adapter."""
        owner, weight = self.weight_owner(), wrapped.weight
        owner.weight = weight
        if getattr(wrapped, "bias", None) is not None:
            owner.bias = wrapped.bias
        if self.has_lora:
            weight.requires_grad = False
            dtype = weight.dtype if lora_dtype is None else lora_dtype
            for name in self.factor_names:
                empty = torch.empty(getattr(self, name).shape, dtype=dtype, device=weight.device)
                setattr(self, name, nn.Parameter(empty))
            self.reset_lora_parameters()
        return self.train(wrapped.training)


def _merge_after_load(layer: LoRALayer, incompatible_keys) -> None:
    if layer._merged_weight is not None:
        layer._merge()
