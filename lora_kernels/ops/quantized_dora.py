"""lora_linear with a magnitude (DoRA) over a frozen weight that is not dense."""

import torch

from lora_kernels.ops.dequantize import dense
from lora_kernels.ops.dora import differentiable_backward, dora_backward, dora_forward, to_save
from lora_kernels.ops.quantized_linear import dense_dtype
from lora_kernels.quantization import FrozenWeight
from lora_kernels.spec import DoraNeeds, DoraSpec

__all__ = ["DoraQuantizedLinear"]


class DoraQuantizedLinear(torch.autograd.Function):
    """DoRA over dense(), made once in the forward, for the norms need it, and once in the backward.

    Saves what DoraLinear saves, without the weight.
    """

    @staticmethod
    def forward(ctx, x, a, b, bias, magnitude, seed, frozen: FrozenWeight, spec: DoraSpec):
        """bias: frozen's own."""
        ctx.frozen, ctx.spec = frozen, spec
        ctx.set_materialize_grads(False)
        needs_x, needs_a, needs_b, needs_bias, needs_magnitude = ctx.needs_input_grad[:5]
        ctx.needs = needs = DoraNeeds(needs_x, False, needs_a, needs_b, needs_bias, needs_magnitude)
        rows = x.numel() // max(1, x.shape[-1])
        w = dense(frozen, dense_dtype(x.dtype, x, rows))
        own_bias = None if bias is None else bias.to(x.dtype)
        y, h, norm, *c = dora_forward(x, w, a, b, own_bias, magnitude, seed, spec)
        ctx.dense_dtype = dense_dtype(x.dtype, x, rows, backward=True)
        # The weight is made again.
        saved = to_save(needs, spec, x, h, None, a, b, own_bias, magnitude, seed, norm, y, *c)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs
        if dy is None or not any(needs):
            return (None,) * 8  # one for each argument of forward
        x, h, _, a, b, *others = ctx.saved_tensors
        w = dense(ctx.frozen, ctx.dense_dtype) if needs.x or needs.magnitude else None
        operands = (dy, x, h, w, a, b, *others)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_backward(operands, ctx.spec, needs)
        else:
            grads = dora_backward(operands, ctx.spec, needs)
        dx, _, *rest = needs.spread(grads)
        return dx, *rest, None, None, None
