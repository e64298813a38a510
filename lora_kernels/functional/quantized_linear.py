"""lora_linear over a frozen weight that is not dense."""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import checks
from lora_kernels.functional.operands import over_values, own_dropout, under_autocast
from lora_kernels.functional.seeds import seeds_for
from lora_kernels.ops.obstacle import (
    is_hooked,
    is_jagged,
    is_opaque,
    is_transformed,
    obstacle,
)
from lora_kernels.ops.quantized_linear import LoraQuantizedLinear, update_dtype
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference import formula
from lora_kernels.reference.linear import accumulate_dtype
from lora_kernels.spec import LoraSpec

__all__ = ["check_over_frozen", "quantized_forward"]


def quantized_forward(
    layer: str | nn.Module,
    x: Tensor,
    frozen: FrozenWeight,
    a: Tensor,
    b: Tensor,
    spec: LoraSpec,
    seed: Tensor | None = None,
) -> Tensor:
    """lora_linear over a frozen weight, for a layer, which names itself in errors.

    If an op cannot compute, or the base layer has hooks, the base layer and the formula do, with
    the base's own autograd.
    """
    if is_jagged(x):
        checks.check_shape(layer, x, frozen)
        return over_values(x, lambda v: quantized_forward(layer, v, frozen, a, b, spec, seed))
    if not is_opaque(x):
        check_over_frozen(layer, x, frozen, a, b, spec)
        seed = seeds_for(layer, x, spec.dropout_p, seed)
        bias = frozen.bias
        if (
            obstacle(x, None, a, b, bias) is None
            and not is_transformed()
            and not is_hooked(frozen.layer)  # a hook may change y, and so dx
            and not _has_any_global_hook()
            and (bias is None or not bias.requires_grad or _stays(bias, x, frozen))
        ):
            spec = under_autocast(spec, x, a, b, update_dtype(x, frozen))
            return LoraQuantizedLinear.apply(x, a, b, bias, seed, frozen, spec)
        x_hat = formula.dropped(x, seed, spec.dropout_p, accumulate_dtype(x.dtype))
    else:
        x_hat = own_dropout(layer, x, spec.dropout_p, seed)
    y = frozen.layer(x)
    with checks.without_autocast(frozen.device):
        return formula.with_update(y, x_hat, a, b, spec, accumulate_dtype(a.dtype))[0]


def check_over_frozen(
    layer: str | nn.Module, x: Tensor, frozen: FrozenWeight, a: Tensor, b: Tensor, spec: LoraSpec
) -> None:
    """The operands fit a frozen weight. Raises: TypeError, ValueError."""
    checks.check_shape(layer, x, frozen)
    if x.device != frozen.device:
        raise ValueError(
            f"{checks.layer_name(layer)}: x must be on the base layer's device "
            f"{frozen.device}, got {x.device}"
        )
    checks.check_operands(layer, frozen, a, b, None, spec.splits)
    checks.check_spec(layer, spec)


def _stays(bias: Tensor, x: Tensor, frozen: FrozenWeight) -> bool:
    """Whether the layer leaves its bias in its dtype. bitsandbytes' do not, before the product.

    Autograd is to see the change, so that the gradient has the new dtype.
    """
    return bias.dtype == frozen.product_dtype(x)
