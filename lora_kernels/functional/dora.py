"""lora_linear with a magnitude (DoRA): checks, autocast and the seed; ops/dora.py computes."""

from torch import Tensor, nn

from lora_kernels import checks
from lora_kernels.functional.operands import of_formula, over_values, prepare, under_autocast
from lora_kernels.functional.quantized_linear import check_over_frozen
from lora_kernels.functional.seeds import seeds_for
from lora_kernels.ops.dora import apply_dora_linear
from lora_kernels.ops.obstacle import is_jagged, is_opaque, is_transformed, obstacle
from lora_kernels.ops.quantized_dora import DoraQuantizedLinear
from lora_kernels.quantization import FrozenWeight
from lora_kernels.reference import dora_formula
from lora_kernels.reference.dora import scale_of
from lora_kernels.spec import DoraSpec

__all__ = ["dora_forward"]


def dora_forward(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor | FrozenWeight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    spec: DoraSpec,
    seed: Tensor | None = None,
) -> Tensor:
    """lora_linear with a magnitude for a layer, which names itself in errors."""
    if isinstance(weight, FrozenWeight):
        return _over_frozen(layer, x, weight, a, b, magnitude, spec, seed)
    if obstacle(x, weight, a, b, bias, magnitude) is not None:
        return _without_op(layer, x, weight, a, b, bias, magnitude, spec, seed)
    x, weight, bias = prepare(layer, x, weight, a, b, bias, spec)
    checks.check_magnitude(layer, magnitude, weight)
    seed = seeds_for(layer, x, spec.dropout_p, seed)
    spec = under_autocast(spec, x, a, b)
    y, *_ = apply_dora_linear(x, weight, a, b, bias, magnitude, seed, spec)
    return y


def _over_frozen(
    layer: str | nn.Module,
    x: Tensor,
    frozen: FrozenWeight,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    spec: DoraSpec,
    seed: Tensor | None,
) -> Tensor:
    """dora_forward over a frozen weight that is not dense; its layer's own bias is the bias."""
    bias = frozen.bias
    if not is_opaque(x):
        dtype = checks.autocast_dtype(x)
        if dtype is not None and not frozen.keeps_dtype:
            x = x.to(dtype)
        if obstacle(x, None, a, b, bias, magnitude) is None and not is_transformed():
            check_over_frozen(layer, x, frozen, a, b, spec)
            checks.check_magnitude(layer, magnitude, frozen)
            seed = seeds_for(layer, x, spec.dropout_p, seed)
            spec = under_autocast(spec, x, a, b)
            return DoraQuantizedLinear.apply(x, a, b, bias, magnitude, seed, frozen, spec)
    dtype = a.dtype if is_opaque(x) else x.dtype
    bias = None if bias is None else bias.to(dtype)
    return _without_op(layer, x, frozen.dense(dtype), a, b, bias, magnitude, spec, seed)


def _without_op(
    layer: str | nn.Module,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    spec: DoraSpec,
    seed: Tensor | None,
) -> Tensor:
    """dora_forward if there is an obstacle: the formula in differentiable PyTorch."""
    if is_jagged(x):
        checks.check_shape(layer, x, weight)
        operands = weight, a, b, bias, magnitude, spec, seed
        return over_values(x, lambda values: dora_forward(layer, values, *operands))
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError(
            f"{checks.layer_name(layer)}: x must be dense or nested with layout=torch.jagged if "
            f"there is a magnitude, got a nested tensor of layout {x.layout}"
        )
    if not is_opaque(x):
        checks.check_magnitude(layer, magnitude, weight)
    x, weight, bias, x_hat, dtype = of_formula(layer, x, weight, a, b, bias, spec, seed)
    norm = dora_formula.row_norms(weight, a, b, spec, dtype)
    m = scale_of(magnitude, norm)
    return dora_formula.with_magnitude(x, x_hat, weight, a, b, bias, m, spec, dtype)[0]
