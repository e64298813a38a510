"""DoRA, for LoRALinear: a parameter lora_magnitude, the norms of the rows of its whole weight."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_kernels import distributed
from lora_kernels.functional.dora import dora_forward
from lora_kernels.layers.base import LoRALayer
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference.dora import row_norms, scale_of
from lora_kernels.spec import DoraSpec, OutputSplits

__all__ = ["TakesMagnitude"]

_PLAIN = {Tensor, nn.Parameter}


class TakesMagnitude(LoRALayer):
    """Mixin of a LoRA linear that has ``lora_magnitude`` [N] if ``use_dora`` is set."""

    dropout_low_rank_only = False

    if TYPE_CHECKING:

        @property
        def output_splits(self) -> OutputSplits: ...

        def oriented(self, weight: Tensor) -> Tensor: ...

    def _add_magnitude(self, use_dora: bool, dropout_low_rank_only: bool) -> None:
        """Gives a layer that has lora_A and lora_B a magnitude, if it is to have one."""
        self.dropout_low_rank_only = bool(dropout_low_rank_only)
        if use_dora and self.has_lora:
            self.lora_magnitude = nn.Parameter(self.lora_B.new_zeros(len(self.lora_B)))
            self.use_dora = True

    @property
    def factor_names(self) -> tuple[str, ...]:
        names = super().factor_names
        return (*names, "lora_magnitude") if self.use_dora else names

    def _reset_magnitude(self) -> None:
        """lora_magnitude becomes the norms of the rows: the layer computes what LoRA does."""
        if self.use_dora and not getattr(self.lora_magnitude, "_is_hf_initialized", False):
            norms = self._row_norms().to(self.lora_magnitude.dtype)
            with torch.no_grad():
                self.lora_magnitude.copy_(distributed.distribute_like(norms, self.lora_magnitude))

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        return row_norms(self._whole_weight(), *self._factors(), self.scaling)

    def _whole_weight(self) -> Tensor:
        """The base weight [N, K], dense and whole."""
        return self.oriented(distributed.full_tensor(self.weight).detach())

    def _magnified_delta(self, acc: torch.dtype) -> Tensor:
        """m∘(weight + scaling·lora_B·lora_A) - weight in acc, in weight's layout."""
        a, b = (factor.to(acc) for factor in self._factors())
        weight = self._whole_weight().to(acc)
        total = torch.addmm(weight, b, a, alpha=self.scaling)
        magnitude = distributed.full_tensor(self.lora_magnitude)
        m = scale_of(magnitude, torch.linalg.vector_norm(total, dim=1).detach())
        return self.oriented(total * m[:, None] - weight)

    @property
    def dora_spec(self) -> DoraSpec:
        """The values of a forward now that are not tensors."""
        p = self.active_dropout_p()
        return DoraSpec(
            self.scaling, p, self.output_splits, low_rank_only=self.dropout_low_rank_only
        )

    def _dora_forward(self, x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None):
        factors = self.lora_A, self.lora_B
        return dora_forward(self, x, weight, *factors, bias, self.lora_magnitude, self.dora_spec)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A base weight that is loaded into a layer nobody has trained brings its own magnitude."""
        anew = (
            self.use_dora
            and prefix + "weight" in state_dict
            and prefix + "lora_magnitude" not in state_dict
            and self._is_as_reset()
        )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if anew:
            self._reset_magnitude()

    def _is_as_reset(self) -> bool:
        tensors = self.weight, self.lora_A, self.lora_B, self.lora_magnitude
        if not {*map(type, tensors)} <= _PLAIN or any(tensor.is_meta for tensor in tensors):
            return False
        return torch.equal(self.lora_magnitude, self._row_norms().to(self.lora_magnitude.dtype))
