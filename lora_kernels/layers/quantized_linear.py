"""LoRAQuantizedLinear: a low-rank update beside a quantised layer, which stays as it is."""

import math

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.foreign import ForeignModule
from lora_kernels.layers.dora import TakesMagnitude
from lora_kernels.layers.merging import undisturbed
from lora_kernels.quantization import FrozenWeight, frozen_weight, restore
from lora_kernels.spec import LoraSpec, OutputSplits

__all__ = ["LoRAQuantizedLinear"]


class LoRAQuantizedLinear(TakesMagnitude, nn.Module):
    """y = base_layer(x) + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ over a frozen, quantised layer.

    base_layer: what ``frozen_weight`` takes: layers of bitsandbytes, torchao, HQQ, quanto, ... It
    is held as it is, and multiplies by its own kernels. The backward makes its weight dense for one
    product. Nothing of the base is kept between the two.

    Shapes: lora_A [r, in], lora_B [out, r]; x [..., in] -> [..., out]. r >= 1. lora_A starts
    Kaiming uniform, lora_B zero. Dropout acts in training mode only. lora_dtype: that of the
    factors; None takes what base_layer multiplies in, or float32 if that is x's.
    use_dora, dropout_low_rank_only: as LoRALinear has them. With use_dora the forward multiplies by
    the dense weight too, because the norms need it. So base_layer is not called, and its hooks do
    not run: a second product by its own kernels would double the cost.
    The layer never merges: eval() computes the update on the fly. ``merged_weight()`` is dense.
    Raises: TypeError if base_layer is of a kind without a frozen weight; ValueError if its state
    does not fit, and for bad r, lora_alpha or lora_dropout.
    Source: Dettmers et al. 2023, arXiv 2305.14314.
    """

    weight_name = "base_layer.weight"

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        lora_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        dropout_low_rank_only: bool = False,
    ):
        frozen = frozen_weight(base_layer)
        nn.Module.__init__(self)
        TakesMagnitude.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if self.r < 1:
            raise ValueError(f"{type(self).__name__}: r must be an integer >= 1, got {r!r}")
        self.out_features, self.in_features = n, k = frozen.shape
        self.base_layer: ForeignModule = base_layer
        dtype, device = lora_dtype or frozen.dtype or torch.float32, frozen.device
        self.lora_A = nn.Parameter(torch.empty((self.r, k), dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty((n, self.r), dtype=dtype, device=device))
        self._add_magnitude(use_dora, dropout_low_rank_only)
        self.reset_lora_parameters()
        self.train(base_layer.training)

    @property
    def frozen_weight(self) -> FrozenWeight:
        """The weight of base_layer as it is now. Raises: as frozen_weight()."""
        return frozen_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """That of base_layer."""
        return self.base_layer.bias

    @property
    def output_splits(self) -> OutputSplits:
        """One group of all output columns."""
        return OutputSplits.whole(self.out_features)

    def reset_lora_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self._reset_magnitude()

    def oriented(self, weight: Tensor) -> Tensor:
        """weight, which is [N, K] already."""
        return weight

    def _whole_weight(self) -> Tensor:
        return self.frozen_weight.dense(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.frozen_weight
        if self.use_dora:
            return self._dora_forward(x, frozen, None)
        spec = LoraSpec(self.scaling, self.active_dropout_p(), self.output_splits)
        return functional.quantized_forward(self, x, frozen, self.lora_A, self.lora_B, spec)

    def _save_to_state_dict(self, *args):
        restore(self)  # before base_layer is asked for its entries
        super()._save_to_state_dict(*args)

    def _apply(self, *args, **kwargs):
        restore(self)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes entries of the layer as it is without LoRA, too."""
        own = (f"{prefix}base_layer.", f"{prefix}lora_")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if not key.startswith(own):
                inside = f"{prefix}base_layer.{key[len(prefix) :]}"
                state_dict.setdefault(inside, state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- merging ----

    def delta_weight(self) -> Tensor:
        if self.use_dora:
            return self._magnified_delta(torch.float32)
        a, b = self._factors()
        return (b.float() @ a.float()) * self.scaling

    def merging_obstacle(self) -> str:
        """Why the layer computes its update on the fly."""
        return "its weight is quantised, and the sum would have to be rounded to its codes"

    def merged_weight(self) -> Tensor:
        """dense() + delta, rounded once to the dtype that the layer multiplies in. A new tensor."""
        frozen = self.frozen_weight
        with undisturbed(self.lora_A):
            merged = frozen.dense(torch.float32).add_(self.delta_weight())
            return merged.to(frozen.dtype or self.lora_A.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout.p}"
            f"{', use_dora=True' if self.use_dora else ''}"
        )
