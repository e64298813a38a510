"""torch.library ops: CUDA -> kernels by plan, CPU -> reference, fake -> shapes.

Two ops serve LoRALinear (one group) and LoRAMergedLinear (several). They carry no autograd formula
of their own; functional.py's autograd Function is built from them. plan.py says which of kernels/
and reference.py a call goes to; the kernels, and triton with them, are imported by the first.
"""

import functools

import torch

from lora_kernels import plan, reference

__all__ = ["lora_linear_backward", "lora_linear_forward"]

_library = torch.library.Library("lora_kernels", "DEF")
_library.define(
    "lora_linear_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor? seed, "
    "float scaling, float dropout_p, SymInt[] out_splits, bool[] enable_lora) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? w, Tensor? a, Tensor? b, "
    "Tensor? seed, float scaling, float dropout_p, SymInt[] out_splits, bool[] enable_lora, "
    "bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(x, w, a, b, bias, seed, scaling, dropout_p, *groups):
    (n, k), r = w.shape, b.shape[1]
    product = plan.Product(
        m=x.numel() // max(1, k), n=n, k=k, r=r, dtype=x.dtype, device=x.device,
        dropout=dropout_p > 0, aligned=plan.aligned(x, w),
    )  # fmt: skip
    args = (x, w, a, b, bias, seed, scaling, dropout_p, *groups)
    y, h = _run("lora_linear_forward", product, args)
    # No view of its rows: y may be changed in place (nn.ReLU(inplace=True)), which autograd forbids
    # for a view that a Function returns.
    return torch.ops.aten._unsafe_view.default(y, y.shape), h


def _backward(dy, x, h, w, a, b, seed, scaling, dropout_p, *groups_and_needs):
    n = dy.shape[-1]
    wide = next((operand for operand in (x, w, a) if operand is not None), None)
    product = plan.Product(
        m=dy.numel() // max(1, n), n=n, k=1 if wide is None else wide.shape[-1],
        r=1 if b is None else b.shape[1], dtype=dy.dtype, device=dy.device,
        dropout=dropout_p > 0, aligned=plan.aligned(dy, w),
    )  # fmt: skip
    args = (dy, x, h, w, a, b, seed, scaling, dropout_p, *groups_and_needs)
    return _run("lora_linear_backward", product, args)


def _run(name: str, product: plan.Product, args: tuple):
    def by_plan(chosen: str):
        if chosen == "reference":
            return getattr(reference, name)(*args)
        from lora_kernels.kernels import linear

        return getattr(linear, name)(chosen, *args)

    dtypes = dict.fromkeys(t.dtype for t in args if isinstance(t, torch.Tensor))
    what = (name, product.device, *dtypes)
    return plan.run(plan.choose(product), what, by_plan)


def _without_autocast(op):
    """Operands arrive in the dtypes they are to be used in; an ambient autocast changes nothing."""

    @functools.wraps(op)
    def wrapper(tensor, *args):
        device_type = tensor.device.type
        if not torch.is_autocast_enabled(device_type):
            return op(tensor, *args)
        with torch.autocast(device_type, enabled=False):
            return op(tensor, *args)

    return wrapper


for _name, _op in (
    ("lora_linear_forward", _forward),
    ("lora_linear_backward", _backward),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _without_autocast(_op), _key)


@torch.library.register_fake("lora_kernels::lora_linear_forward", lib=_library)
def _lora_linear_forward_fake(x, w, a, b, bias, seed, scaling, dropout_p, out_splits, enable_lora):
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    m = x.numel() // x.shape[-1]
    h = x.new_empty((m, a.shape[0]), dtype=reference.accumulate_dtype(x.dtype))
    return y, h


@torch.library.register_fake("lora_kernels::lora_linear_backward", lib=_library)
def _lora_linear_backward_fake(
    dy, x, h, w, a, b, seed, scaling, dropout_p, out_splits, enable_lora, needs
):
    needs_x, needs_w, needs_a, needs_b, needs_bias = needs
    grads = []
    if needs_x:
        grads.append(dy.new_empty((*dy.shape[:-1], w.shape[1])))
    if needs_w:
        grads.append(dy.new_empty((dy.shape[-1], x.shape[-1])))
    if needs_a:
        grads.append(a.new_empty(a.shape))
    if needs_b:
        grads.append(b.new_empty(b.shape))
    if needs_bias:
        grads.append(dy.new_empty((dy.shape[-1],)))
    return grads


lora_linear_forward = torch.ops.lora_kernels.lora_linear_forward.default
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward.default
