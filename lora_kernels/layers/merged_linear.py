"""LoRAMergedLinear: several projections in one weight, each with a low-rank update of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_kernels import functional, reference
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.linear import LinearLayer

__all__ = ["LoRAMergedLinear"]


class LoRAMergedLinear(LinearLayer):
    """nn.Linear whose output columns fall into groups; enabled groups get a low-rank update.

    enable_lora says which of the G groups are enabled; they are equal, or have the sizes in
    out_splits (grouped-query attention). With E enabled groups, group g of them uses rows
    [g·r, (g+1)·r) of lora_A and its own block of rows of lora_B, and all share one dropout mask.

    Shapes: weight [out, in] ([in, out] with fan_in_fan_out), lora_A [r·E, in],
    lora_B [sum of the enabled splits, r]; x [..., in] -> [..., out]. Initial values as LoRALinear.
    r = 0 or no enabled group: a plain trainable nn.Linear. Other keywords go to nn.Linear.
    Raises: ValueError where len(enable_lora) does not divide out_features or out_splits does not
    fit; otherwise as LoRALinear.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.2; loralib's MergedLinear.
    """

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
        **kwargs,
    ):
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = _check_enable(enable_lora)
        self.out_splits = _check_splits(out_features, self.enable_lora, out_splits)
        self._set_layout(fan_in_fan_out)
        if self.r > 0 and any(self.enable_lora):
            self._add_adapter(
                (self.r * sum(self.enable_lora), in_features),
                (self._enabled_columns(), self.r),
            )
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
    ) -> "LoRAMergedLinear":
        """Wraps an nn.Linear or a Hugging Face Conv1D: same parameters, no copy, same mode.

        lora_dtype: dtype of lora_A and lora_B; None takes the weight's.
        """
        return cls._wrap(
            linear, lora_dtype, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            enable_lora=enable_lora, merge_weights=merge_weights, out_splits=out_splits,
        )  # fmt: skip

    def _enabled_columns(self) -> int:
        return sum(n for n, on in zip(self.out_splits, self.enable_lora, strict=True) if on)

    @property
    def lora_ind(self) -> Tensor:
        """Bool [out_features] on the weight's device: which output columns have an update."""
        enabled = torch.tensor(self.enable_lora, device=self.weight.device)
        sizes = torch.tensor(self.out_splits, device=self.weight.device)
        return enabled.repeat_interleave(sizes, output_size=self.out_features)

    def zero_pad(self, x: Tensor) -> Tensor:
        """Rows of the enabled groups -> rows of all groups, zero where disabled."""
        padded = x.new_zeros((self.out_features, *x.shape[1:]))
        for columns, rows, _ in self._groups():
            padded[columns] = x[rows]
        return padded

    def merge_AB(self) -> Tensor:
        """The update of the whole weight before scaling, as weight is stored."""
        a, b = self._factors()
        product = torch.cat([b[rows] @ a[ranks] for _, rows, ranks in self._groups()])
        return self._oriented(self.zero_pad(product))

    def delta_weight(self) -> Tensor:
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        a, b = (factor.to(acc) for factor in self._factors())
        delta = a.new_zeros((self.out_features, self.in_features))
        for columns, rows, ranks in self._groups():
            delta[columns] = b[rows] @ a[ranks]
        return self._oriented(delta) * self.scaling

    def _groups(self):
        return reference.groups(self.out_splits, self.enable_lora, self.r)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, enable_lora={self.enable_lora}, out_splits={self.out_splits}"
        )


def _check_enable(enable_lora) -> list[bool]:
    flags = list(enable_lora) if isinstance(enable_lora, (list, tuple)) else None
    if not flags or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(
            f"LoRAMergedLinear: enable_lora must be a list of at least one bool, "
            f"got {enable_lora!r}"
        )
    return flags


def _check_splits(out_features: int, enable_lora: list[bool], out_splits) -> list[int]:
    if out_splits is None:
        return functional.equal_splits(out_features, enable_lora, "LoRAMergedLinear")
    splits = list(out_splits)
    fits = len(splits) == len(enable_lora) and all(
        isinstance(size, int) and size >= 1 for size in splits
    )
    if not fits or sum(splits) != out_features:
        raise ValueError(
            f"LoRAMergedLinear: out_splits must be {len(enable_lora)} sizes >= 1 that sum to "
            f"out_features={out_features}, got {out_splits!r}"
        )
    return splits
