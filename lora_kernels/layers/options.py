"""The keywords that layers pass on to the constructors of torch's layers, for type checkers.

What runs takes whatever the installed torch does, see check_options in foreign.py.
"""

from typing import TypedDict

import torch
from torch import Tensor

__all__ = ["ConvOptions", "EmbeddingOptions", "LinearOptions"]


class _Options(TypedDict, total=False):
    device: torch.device | str | int | None
    dtype: torch.dtype | None


class LinearOptions(_Options, total=False):
    """Those of nn.Linear."""

    bias: bool


class EmbeddingOptions(_Options, total=False):
    """Those of nn.Embedding."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    _weight: Tensor | None
    _freeze: bool


class ConvOptions(_Options, total=False):
    """Those of nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    stride: int | tuple[int, ...]
    padding: str | int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    groups: int
    bias: bool
    padding_mode: str
