"""LoRAMergedLinear: several projections in one weight, each with a low-rank update of its own."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_kernels.foreign import check_options, named_by_layer
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LinearLayer
from lora_kernels.spec import OutputSplits

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lora_kernels.layers.options import LinearOptions

__all__ = ["LoRAMergedLinear"]


class LoRAMergedLinear(LinearLayer):
    """nn.Linear whose output columns fall into groups; enabled groups get a low-rank update.

    enable_lora says which of the groups are enabled. The groups are of equal size, or have the
    sizes in out_splits (grouped-query attention). Of E enabled groups, the g-th has rows
    [g·r, (g+1)·r) of lora_A and its own block of rows of lora_B. All groups share one dropout mask.

    Shapes: weight [out, in] ([in, out] with fan_in_fan_out), lora_A [r·E, in],
    lora_B [sum of the enabled splits, r]; x [..., in] -> [..., out]. Initial values as LoRALinear.
    r = 0, or no group enabled: a plain trainable nn.Linear. Other keywords go to nn.Linear.
    Dtypes: as lora_linear.
    Raises: ValueError if len(enable_lora) does not divide out_features or out_splits does not fit;
    otherwise as LoRALinear.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.2; loralib's MergedLinear.
    """

    @named_by_layer
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        out_splits: Sequence[int] | None = None,
        **kwargs: "Unpack[LinearOptions]",
    ):
        if kwargs.get("use_dora"):
            raise NotImplementedError(
                f"{type(self).__name__}: use_dora=True, and its groups have no magnitude: take a "
                f"LoRALinear with use_dora for each group"
            )
        check_options(type(self), nn.Linear, kwargs)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if isinstance(out_splits, Iterable) and not isinstance(out_splits, (list, tuple, str)):
            out_splits = list(out_splits)
        splits = OutputSplits.of(out_features, enable_lora, out_splits, owner=type(self).__name__)
        self.enable_lora, self.out_splits = list(splits.enabled), list(splits.sizes)
        self._set_layout(fan_in_fan_out)
        if self.r > 0 and any(splits.enabled):
            self._add_adapter((self.r * splits.count, in_features), (splits.rows, self.r))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (True,),
        merge_weights: bool = True,
        *,
        out_splits: Sequence[int] | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> "Self":
        """Wraps an nn.Linear or a Hugging Face Conv1D: same parameters, no copy, same mode.

        lora_dtype: dtype of lora_A and lora_B; None takes the weight's.
        Raises: TypeError for any other module, subclasses with a forward of their own included.
        """
        return cls._wrap(
            linear,
            lora_dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            enable_lora=enable_lora,
            merge_weights=merge_weights,
            out_splits=out_splits,
        )

    def _come_from_loralib(self) -> None:
        self.__dict__.pop("lora_ind", None)  # a property here
        count = len(self.enable_lora)
        self.enable_lora = list(self.enable_lora)
        self.out_splits = [self.out_features // count] * count
        super()._come_from_loralib()

    @property
    def output_splits(self) -> OutputSplits:
        """The groups of output columns: out_splits and enable_lora."""
        return OutputSplits(tuple(self.out_splits or ()), tuple(self.enable_lora))

    @property
    def lora_ind(self) -> Tensor:
        """Bool [out_features] on the weight's device: which output columns have an update."""
        enabled = torch.tensor(self.enable_lora, device=self.weight.device)
        sizes = torch.tensor(self.out_splits, device=self.weight.device)
        return enabled.repeat_interleave(sizes, output_size=self.out_features)

    def zero_pad(self, x: Tensor) -> Tensor:
        """Rows of the enabled groups -> rows of all groups; rows of disabled groups are zero."""
        padded = x.new_zeros((self.out_features, *x.shape[1:]))
        for columns, rows, _ in self.output_splits.groups(self.r):
            padded[columns] = x[rows]
        return padded

    def merge_AB(self) -> Tensor:
        """The update of the whole weight before scaling, in the layout of weight."""
        a, b = self._factors()
        product = torch.cat(
            [b[rows] @ a[ranks] for _, rows, ranks in self.output_splits.groups(self.r)]
        )
        return self.oriented(self.zero_pad(product))

    def delta_weight(self) -> Tensor:
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        a, b = (factor.to(acc) for factor in self._factors())
        parts, end = [], 0
        for columns, rows, ranks in self.output_splits.groups(self.r):
            parts += [a.new_zeros((columns.start - end, a.shape[1])), b[rows] @ a[ranks]]
            end = columns.stop
        parts.append(a.new_zeros((self.out_features - end, a.shape[1])))
        return self.oriented(torch.cat(parts)) * self.scaling

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, enable_lora={self.enable_lora}, out_splits={self.out_splits}"
        )
