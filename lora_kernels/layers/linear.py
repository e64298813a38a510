"""LoRALinear: nn.Linear with a low-rank update."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import checks, functional
from lora_kernels.foreign import ForeignModule, check_options, named_by_layer
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.dora import TakesMagnitude
from lora_kernels.layers.merging import takes_merged_weight
from lora_kernels.ops.obstacle import is_opaque, obstacle
from lora_kernels.quantization import is_quantised
from lora_kernels.spec import LoraSpec, OutputSplits, linear_spec

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lora_kernels.layers.options import LinearOptions
    from lora_kernels.layers.shared_input import SharedInput

__all__ = ["LinearLayer", "LoRALinear", "is_hf_conv1d"]


def is_hf_conv1d(module: object) -> bool:
    """Whether module is transformers' Conv1D: a linear that stores its weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


class LinearLayer(LoRALayer, nn.Linear):
    """What LoRALinear and LoRAMergedLinear share: the weight's layout, wrapping, the forward."""

    weight: Tensor
    _shared_input: "SharedInput | None" = None  # if share_inputs joined the layer with others

    if TYPE_CHECKING:

        def __init__(self, in_features: int, out_features: int, **options: Any): ...

        def _dora_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def _set_layout(self, fan_in_fan_out: bool) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            empty = self.weight.new_empty((self.in_features, self.out_features))
            self.weight = nn.Parameter(empty)

    @classmethod
    def _wrap(cls, linear: ForeignModule, lora_dtype: torch.dtype | None, **kwargs: Any) -> "Self":
        fan_in_fan_out = is_hf_conv1d(linear)
        if is_quantised(linear):
            raise TypeError(
                f"{cls.__name__}: linear must be a plain nn.Linear or Hugging Face Conv1D, and "
                f"{type(linear).__name__} is quantised: use LoRAQuantizedLinear(linear, r, ...)"
            )
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not (plain or fan_in_fan_out) or "weight" not in linear._parameters:
            raise TypeError(
                f"{cls.__name__}: linear must be a plain nn.Linear or Hugging Face Conv1D, not a "
                f"subclass with a forward of its own or parametrized, got {type(linear).__name__}"
            )
        shape = linear.weight.T.shape if fan_in_fan_out else linear.weight.shape
        layer = cls(
            shape[1],
            shape[0],
            fan_in_fan_out=fan_in_fan_out,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            **kwargs,
        )
        return layer._adopt(linear, lora_dtype)

    @property
    def output_splits(self) -> OutputSplits:
        """The groups of output columns."""
        return OutputSplits.whole(self.oriented(self.weight).shape[0])

    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Linear does, in both layouts; lora_A and lora_B anew."""
        if getattr(self, "fan_in_fan_out", False):
            with torch.no_grad():
                drawn = self.weight.new_empty((self.out_features, self.in_features))
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                self.weight.copy_(drawn.T)
                if self.bias is not None:
                    bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
                    nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.Linear.reset_parameters(self)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        if self.has_lora:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def oriented(self, weight: Tensor) -> Tensor:
        """A view of [N, K] in the layout of the parameter weight, or of that layout as [N, K]."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def computed_together(self) -> tuple["LinearLayer", ...]:
        """The layers that one call computes for the same x, this one among them."""
        shared = self._shared_input
        return shared.layers if shared is not None and shared.together() else (self,)

    def _spec(self, weight: Tensor) -> LoraSpec:
        """The values of this call's update; weight is oriented."""
        return LoraSpec(self.scaling, self.active_dropout_p(), self.output_splits)

    @takes_merged_weight
    def forward(self, x: Tensor) -> Tensor:
        complete = self.complete_weight()
        if complete is not None:
            weight = self.oriented(complete)
            if not is_opaque(x):
                checks.check_weight(self, weight)
                checks.check_input(self, x, weight)
            return F.linear(x, weight, self.bias)
        weight, a, b, bias = self.oriented(self.weight), self.lora_A, self.lora_B, self.bias
        if self.use_dora:
            return self._dora_forward(x, weight, bias)
        if self._shared_input is not None and obstacle(x, weight, a, b, bias) is None:
            y = self._shared_input.output(self, x)
            if y is not None:
                return y
        spec = self._spec(weight)
        return functional.lora_forward(self, x, weight, a, b, bias, spec)

    def extra_repr(self) -> str:
        text = f"{nn.Linear.extra_repr(self)}, r={self.r}"
        if self.has_lora:
            text += f", lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout.p}"
        if self.use_dora:
            text += ", use_dora=True"
        return text


class LoRALinear(TakesMagnitude, LinearLayer):
    """y = x·Wᵀ + bias + scaling·(dropout(x)·lora_Aᵀ)·lora_Bᵀ with W frozen.

    Shapes: weight [out, in] ([in, out] with fan_in_fan_out), lora_A [r, in], lora_B [out, r];
    x [..., in] -> [..., out]. lora_A starts Kaiming uniform, lora_B zero. r = 0: a plain trainable
    nn.Linear. Dropout acts in training mode only. Other keywords go to nn.Linear.
    use_dora: DoRA, see the magnitude of lora_linear. The layer trains lora_magnitude [out] as well,
    which starts as the norms of weight's rows. dropout_low_rank_only: dropout acts on the low-rank
    part alone, and not, as PEFT's does, on all that the magnitude adds to the frozen layer: this
    spares a second large product in training.
    Dtypes: as lora_linear.
    Raises: ValueError and TypeError as LoRALayer and lora_linear do, naming this layer.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; loralib's Linear; DoRA: Liu et al. 2024,
    arXiv 2402.09353.
    """

    @named_by_layer
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        use_dora: bool = False,
        dropout_low_rank_only: bool = False,
        **kwargs: "Unpack[LinearOptions]",
    ):
        check_options(type(self), nn.Linear, kwargs)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._set_layout(fan_in_fan_out)
        if self.r > 0:
            self._add_adapter((self.r, in_features), (out_features, self.r))
        self._add_magnitude(use_dora, dropout_low_rank_only)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        lora_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        dropout_low_rank_only: bool = False,
    ) -> "Self":
        """Wraps an nn.Linear or a Hugging Face Conv1D: same parameters, no copy, same mode.

        lora_dtype: dtype of lora_A, lora_B and lora_magnitude; None takes the weight's.
        Raises: TypeError for any other module, subclasses with a forward of their own included.
        """
        return cls._wrap(
            linear,
            lora_dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            merge_weights=merge_weights,
            use_dora=use_dora,
            dropout_low_rank_only=dropout_low_rank_only,
        )

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        self._reset_magnitude()

    def _spec(self, weight: Tensor) -> LoraSpec:
        columns = weight.shape[0]
        if type(columns) is not int or torch.compiler.is_dynamo_compiling():
            return super()._spec(weight)
        return linear_spec(self.scaling, self.active_dropout_p(), columns)

    def delta_weight(self) -> Tensor:
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        if self.use_dora:
            return self._magnified_delta(acc)
        a, b = self._factors()
        return self.oriented(b.to(acc) @ a.to(acc)) * self.scaling
