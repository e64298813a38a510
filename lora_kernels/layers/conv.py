"""LoRAConv1d, LoRAConv2d, LoRAConv3d: a convolution with a low-rank update of its kernel."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_kernels import checks, distributed
from lora_kernels.foreign import check_options, named_by_layer
from lora_kernels.layers.base import LoRALayer
from lora_kernels.layers.merging import takes_merged_weight
from lora_kernels.ops.obstacle import is_opaque, is_plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lora_kernels.layers.options import ConvOptions

__all__ = ["ConvLoRA", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d"]

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvLoRA(LoRALayer, nn.Module):
    """y = conv(x, W) + bias + conv(dropout(x), scaling·(lora_B·lora_A).view_as(W)) with W frozen.

    conv_module is nn.Conv1d, nn.Conv2d or nn.Conv3d; the module itself is ``.conv`` and holds
    weight and bias. Other keywords go to it: stride, padding, dilation, groups, padding_mode, bias.

    Shapes: weight [out, in/groups, k_0, k_1, ...], lora_A [r·k_0, in·k_0],
    lora_B [out/groups·k_1·..., r·k_0]; x and y as those of conv. lora_A starts Kaiming uniform,
    lora_B zero. r = 0: a plain trainable convolution. Dropout acts in training mode only, and costs
    a second convolution then. So does offloading, which leaves conv its weight only while it runs.
    Dtypes: x and weight share a float dtype (autocast sees to it), lora_A and lora_B may have
    another.
    The update is computed in float32 at least and rounded once.
    State dict: conv.weight, conv.bias, lora_A, lora_B. Loading also takes the keys weight and bias,
    which loralib's unreleased version writes besides or instead of the first two.
    Raises: ValueError as LoRALayer does, and if conv_module, kernel_size or x does not fit;
    TypeError if x is not a dense floating-point tensor; RuntimeError from load_state_dict if both
    spellings of a key are there and differ, and from the forward if fully_shard was applied to the
    conv alone.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; loralib's ConvLoRA.
    """

    weight_name = "conv.weight"

    def __init__(
        self,
        conv_module: type[_Conv],
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: "Unpack[ConvOptions]",
    ):
        nn.Module.__init__(self)
        layer = type(self).__name__
        plain = _plain_conv(conv_module)
        if plain is None:
            raise ValueError(
                f"{layer}: conv_module must be nn.Conv1d, nn.Conv2d or nn.Conv3d, "
                f"got {conv_module!r}"
            )
        _check_kernel(kernel_size, _DIMENSIONS[plain], layer)
        check_options(type(self), conv_module, kwargs)
        make: Callable[..., _Conv] = conv_module
        self.conv = make(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if self.r > 0:
            first, *rest = self.conv.kernel_size
            self._add_adapter(
                (self.r * first, in_channels * first),
                (out_channels // self.conv.groups * math.prod(rest), self.r * first),
            )
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: _Conv,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        lora_dtype: torch.dtype | None = None,
    ) -> "ConvLoRA":
        """Wraps an nn.Conv1d, nn.Conv2d or nn.Conv3d: same parameters, no copy, same options, mode.

        ConvLoRA.from_conv makes the layer of conv's dimension; LoRAConv1d and the others take only
        convolutions of their own dimension.
        lora_dtype: dtype of lora_A and lora_B; None takes the weight's.
        Raises: TypeError if conv is not such a module, or has a forward of its own or a weight that
        is parametrized or lazy.
        """
        plain = _plain_conv(type(conv))
        layer_class = _LAYERS[plain] if plain is not None and cls is ConvLoRA else cls
        if plain is None or not issubclass(layer_class, _LAYERS[plain]):
            expected = [kind.__name__ for kind, its in _LAYERS.items() if issubclass(its, cls)]
            raise TypeError(
                f"{cls.__name__}: conv must be an nn.{' or nn.'.join(expected)}, "
                f"got {type(conv).__name__}"
            )
        own_way = (
            type(conv).forward is not plain.forward
            or type(conv)._conv_forward is not plain._conv_forward
            or "weight" not in conv._parameters
            or is_lazy(conv.weight)
        )
        if own_way:
            raise TypeError(
                f"{cls.__name__}: conv must be a plain nn.{plain.__name__}, not a subclass with a "
                f"forward of its own, parametrized or lazy, got {type(conv).__name__}"
            )
        layer = layer_class(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            r,
            lora_alpha,
            lora_dropout,
            merge_weights,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            dtype=conv.weight.dtype,
        )
        return layer._adopt(conv, lora_dtype)

    @property
    def weight(self) -> Tensor:
        """The convolution's weight; the parameter is registered there alone."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """The convolution's bias; the parameter is registered there alone."""
        return self.conv.bias

    def reset_parameters(self) -> None:
        """Draws weight and bias as the plain convolution does, lora_A and lora_B anew."""
        self.conv.reset_parameters()
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        if self.has_lora:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        weight = self.held_weight()
        acc = torch.promote_types(weight.dtype, torch.float32)
        a, b = self._factors()
        return (b.to(acc) @ a.to(acc) * self.scaling).view(weight.shape)

    @takes_merged_weight
    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if not self.has_lora:
            return self.conv(x)
        complete = self.complete_weight()
        if complete is not None:
            return self.conv._conv_forward(x, complete, self.conv.bias)
        weight, bias = self.conv.weight, self.conv.bias
        held = self.held_weight()
        twice = self._drops(x) or self._is_hooked or not is_plain(type(held))
        with checks.without_autocast(held.device):
            delta = self.delta_weight()
            kernel = (delta if twice else weight + delta).to(held.dtype)
        if not twice:
            return self.conv._conv_forward(x, kernel, bias)
        y = self.conv(x) if self._is_hooked else self.conv._conv_forward(x, weight, bias)
        return y + self.conv._conv_forward(self.lora_dropout(x), kernel, None)

    def _drops(self, x: Tensor) -> bool:
        """Whether dropout acts; if torch.fx records, whether it would in training mode."""
        return self.active_dropout_p() > 0 or (is_opaque(x) and self.lora_dropout.p > 0)

    @property
    def _is_hooked(self) -> bool:
        """Whether conv may have its weight during its own calls only, as offloading has it."""
        return "forward" in self.conv.__dict__

    def _check_input(self, x: Tensor) -> None:
        if is_opaque(x):
            return
        checks.check_tensor(self, "x", x)
        weight, channels = self.conv.weight, self.conv.in_channels
        unbatched = weight.dim() - 1
        if distributed.is_dtensor(weight):
            raise RuntimeError(
                f"{checks.layer_name(self)}: fully_shard was applied to its conv, which is never "
                f"called and so never gathers weight: apply fully_shard to the LoRA layer, or to a "
                f"module around it"
            )
        if x.dim() not in (unbatched, unbatched + 1) or x.shape[-unbatched] != channels:
            shape = ", ".join((str(channels), *"*" * (unbatched - 1)))
            raise ValueError(
                f"{checks.layer_name(self)}: x must have shape [N, {shape}] or [{shape}], "
                f"got {list(x.shape)}"
            )
        if not self._is_hooked:
            checks.check_device_and_dtype(self, x, weight)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        errors = args[-1]
        for name in ("weight", "bias"):
            other, own = f"{prefix}{name}", f"{prefix}conv.{name}"
            if other not in state_dict:
                continue
            value = state_dict.pop(other)
            if not _agree(value, state_dict.setdefault(own, value)):
                errors.append(f"{other} and {own} are both in the state dict and differ")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.conv.extra_repr()}, r={self.r}"
        if self.has_lora:
            text += f", lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout.p}"
        return text


class LoRAConv(ConvLoRA):
    """What LoRAConv1d, LoRAConv2d and LoRAConv3d share: ConvLoRA around one class."""

    _kind: type[_Conv]

    @named_by_layer
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: "Unpack[ConvOptions]",
    ):
        super().__init__(
            self._kind,
            in_channels,
            out_channels,
            kernel_size,
            r,
            lora_alpha,
            lora_dropout,
            merge_weights,
            **kwargs,
        )


class LoRAConv1d(LoRAConv):
    """ConvLoRA around nn.Conv1d: (in_channels, out_channels, kernel_size, r=0, ...)."""

    _kind = nn.Conv1d


class LoRAConv2d(LoRAConv):
    """ConvLoRA around nn.Conv2d: (in_channels, out_channels, kernel_size, r=0, ...)."""

    _kind = nn.Conv2d


class LoRAConv3d(LoRAConv):
    """ConvLoRA around nn.Conv3d: (in_channels, out_channels, kernel_size, r=0, ...)."""

    _kind = nn.Conv3d


_LAYERS: dict[type[_Conv], type[LoRAConv]] = {
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}
_DIMENSIONS: dict[type[_Conv], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def _plain_conv(conv_module: object) -> type[_Conv] | None:
    """Which of nn.Conv1d, nn.Conv2d and nn.Conv3d a class is or derives from."""
    if not isinstance(conv_module, type):
        return None
    return next((plain for plain in _DIMENSIONS if issubclass(conv_module, plain)), None)


def _check_kernel(kernel_size, dimensions: int, layer: str) -> None:
    sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else [kernel_size] * dimensions
    fits = len(sizes) == dimensions and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes
    )
    if not fits:
        raise ValueError(
            f"{layer}: kernel_size must be an integer >= 1 or {dimensions} of them, "
            f"got {kernel_size!r}"
        )


def _agree(left: Tensor, right: Tensor) -> bool:
    """Whether two entries of a state dict hold the same values."""
    return (left.shape, left.dtype) == (right.shape, right.dtype) and torch.allclose(
        left.cpu(), right.cpu(), rtol=0, atol=0, equal_nan=True
    )
